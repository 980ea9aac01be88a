"""Factors that one library keeps in a parameter and another in a weight: products in float64, stored in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(weight: Tensor, factor: Tensor | float) -> Tensor:
    """[out, in] with each output times a factor [out]; a weight that does not change keeps its dtype."""
    by = torch.as_tensor(factor, dtype=torch.float64)
    if bool((by == 1).all()):
        return weight
    return (weight.double() * (by[:, None] if by.dim() else by)).float()


def columns(weight: Tensor, factor: Tensor | float) -> Tensor:
    """[out, in] with each input times a factor [in]; a weight that does not change keeps its dtype."""
    by = torch.as_tensor(factor, dtype=torch.float64)
    if bool((by == 1).all()):
        return weight
    return (weight.double() * by).float()


def shared(weight: Tensor, heads: int, times: int) -> Tensor:
    """[heads * width, ...] with each head's rows once for every query head that it serves."""
    if times == 1:
        return weight
    return weight.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)
