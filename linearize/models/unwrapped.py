"""A model out of what peft wraps around it."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """The causal language model itself, out of a PeftModel."""
    peft: Any = model
    return peft.get_base_model() if hasattr(model, "get_base_model") else model
