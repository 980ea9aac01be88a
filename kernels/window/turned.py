"""Queries as they look at keys that are to seem nearer than they are: rotated back by some tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def turned_back(q: Tensor, more: Tensor, turns: Tensor) -> Tensor:
    """q [B, T, H, K], rotated to its place by halves, turned back by `more` tokens; the angles are float64.

    Args:
        more: [B or 1, T] tokens.
        turns: [R / 2] float64, radians a token of each pair of dims i and i + R / 2.
    """
    angles = more[..., None, None].to(torch.float64) * turns
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    half = len(turns)
    near, other, rest = wide.split([half, half, q.shape[-1] - 2 * half], -1)
    return torch.cat([near * cos + other * sin, other * cos - near * sin, rest], -1).to(q.dtype)
