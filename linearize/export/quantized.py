"""Weights that are stored as codes: whether they can be read here, which they are, and their size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from linearize.errors import CheckpointError, LinearizeError

INSTALL = "pip install 'linearize[quantize]'"


def check_torchao(what: str) -> None:
    """Refuse where torchao is not installed.

    Args:
        what: needs it, for the message.

    Raises:
        LinearizeError: says how to install it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise LinearizeError(f"{what} needs torchao, which is not installed: {INSTALL}")


def check_readable(folder: Path, config: Any) -> None:
    """Refuse a checkpoint whose codes cannot be read here, before transformers says so in words of its own.

    Raises:
        CheckpointError: by another method than torchao's.
        LinearizeError: torchao is not installed.
    """
    given = getattr(config, "quantization_config", None)
    if not given:
        return
    found = given if isinstance(given, dict) else vars(given)
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method")))
    if method != "torchao":
        raise CheckpointError(
            f"{folder}: its weights are quantized by '{method}', and converted checkpoints are quantized by torchao "
            "alone; export it again (linearize export PATH --quantize int8)"
        )
    check_torchao(f"{folder}, which holds quantized weights,")


def codes(model: nn.Module) -> list[str]:
    """Names of the weights that are stored as codes."""
    return [
        name for name, tensor in model.named_parameters() if is_traceable_wrapper_subclass(tensor.detach())
    ]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of the model holds, a tied one once."""
    return sum(_bytes(tensor.detach()) for tensor in model.parameters())


def _bytes(tensor: Any) -> int:
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())
