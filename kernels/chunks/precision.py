"""The precision that the torch forms compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def at_least_float32(*tensors: Tensor | None) -> list[Any]:
    """Tensors of 16 bits in float32, others as they are."""
    return [
        x if x is None or not x.is_floating_point() else x.to(torch.promote_types(x.dtype, torch.float32))
        for x in tensors
    ]
