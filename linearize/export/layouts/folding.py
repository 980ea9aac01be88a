"""Factors that one library keeps in a parameter and another in a weight: products in float64, stored in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(weight: Tensor, factor: Tensor | float) -> Tensor:
    """[out, in] with each output times a factor [out]; in its own dtype where that is exact."""
    by = torch.as_tensor(factor, dtype=torch.float64)
    return _times(weight, by[:, None] if by.dim() else by)


def columns(weight: Tensor, factor: Tensor | float) -> Tensor:
    """[out, in] with each input times a factor [in]; in its own dtype where that is exact."""
    return _times(weight, torch.as_tensor(factor, dtype=torch.float64))


def _times(weight: Tensor, by: Tensor) -> Tensor:
    made = weight.double() * by
    own = made.to(weight.dtype)
    # a power of two moves the exponent alone
    return own if bool((own.double() == made).all()) else made.float()


def shared(weight: Tensor, heads: int, times: int) -> Tensor:
    """[heads * width, ...] with each head's rows once for every query head that it serves."""
    if times == 1:
        return weight
    return weight.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)
