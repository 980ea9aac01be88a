"""Calls of conjugate whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.conjugate import begun, conjugate_solve, conjugate_step


def step(heads: int, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Of 128 tokens."""
    solving = begun(torch.zeros(128, heads, width), dtype)
    conjugate_step(solving, torch.zeros(128, heads, width, dtype=dtype), torch.ones(heads, width))


def solve(heads: int, held: int, width: int) -> None:
    """Of two rows."""
    conjugate_solve(
        torch.zeros(2, held, width, width), torch.zeros(2, heads, width), torch.ones(heads, width), 30
    )


CALLS: dict[str, Callable[[], None]] = {
    "step of 64": partial(step, 9, 64),
    "step of 128, float32": partial(step, 32, 128, torch.float32),
    "step of 48": partial(step, 4, 48),
    "solution of 64": partial(solve, 9, 9, 64),
    "solution of 128": partial(solve, 32, 8, 128),
}
