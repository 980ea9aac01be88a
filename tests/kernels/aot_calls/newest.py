"""Calls of newest whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.newest import newest_step


def step(heads: int, held: int, dim: int, dtype: torch.dtype = torch.bfloat16, **options: float) -> None:
    """One token of two rows, 1,024 slots."""
    ring = torch.zeros(2, held, 1024, dim, dtype=dtype)
    places = torch.zeros(2, dtype=torch.int64)
    newest_step(
        torch.zeros(2, heads, dim, dtype=dtype), ring, ring, places, places + 1, scaling=0.125, **options
    )


CALLS: dict[str, Callable[[], None]] = {
    "dim 64": partial(step, 9, 3, 64),
    "dim 128": partial(step, 32, 8, 128),
    "dim 256, soft cap": partial(step, 8, 4, 256, softcap=50.0),
    "float32": partial(step, 9, 3, 64, torch.float32),
}
