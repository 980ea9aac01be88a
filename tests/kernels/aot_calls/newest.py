"""Calls of newest whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.newest import newest_steps


def steps(
    heads: int, held: int, dim: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 1, **options: float
) -> None:
    """Tokens of two rows, 1,024 slots."""
    ring = torch.zeros(2, held, 1024, dim, dtype=dtype)
    places = torch.zeros(2, tokens, dtype=torch.int64)
    q = torch.zeros(2, tokens, heads, dim, dtype=dtype)
    newest_steps(q, ring, ring, places, places + 1, scaling=0.125, **options)


CALLS: dict[str, Callable[[], None]] = {
    "dim 64": partial(steps, 9, 3, 64),
    "dim 128": partial(steps, 32, 8, 128),
    "dim 256, soft cap": partial(steps, 8, 4, 256, softcap=50.0),
    "float32": partial(steps, 9, 3, 64, torch.float32),
    "five tokens, dim 64": partial(steps, 9, 3, 64, tokens=5),
    "five tokens, dim 128": partial(steps, 32, 8, 128, tokens=5),
    "nine tokens, dim 64": partial(steps, 32, 8, 64, tokens=9),
    "as many as fit, dim 64": partial(steps, 32, 8, 64, tokens=32),
    "as many as fit, dim 128": partial(steps, 32, 8, 128, tokens=16),
    "as many as fit, dim 256": partial(steps, 8, 4, 256, tokens=16),
    "five tokens, float32": partial(steps, 9, 3, 64, torch.float32, tokens=5),
}
