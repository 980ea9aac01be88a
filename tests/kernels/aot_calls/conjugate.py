"""Calls of conjugate whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.conjugate import begun, conjugate_chunk, conjugate_solve, conjugate_step


def step(heads: int, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Of 128 tokens."""
    solving = begun(torch.zeros(128, heads, width), dtype)
    conjugate_step(solving, torch.zeros(128, heads, width, dtype=dtype), torch.ones(heads, width))


def solve(heads: int, held: int, width: int) -> None:
    """Of two rows."""
    conjugate_solve(
        torch.zeros(2, held, width, width), torch.zeros(2, heads, width), torch.ones(heads, width), 30
    )


def chunk(
    heads: int,
    held: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    docs: bool = True,
    batch: int = 64,
) -> None:
    """Of texts of 1,024 tokens, or a long one."""
    tokens = 65_536 // batch
    keys = torch.zeros(batch, tokens, held, width, dtype=dtype)
    given = torch.zeros(batch, tokens, dtype=torch.int64) if docs else None
    target, ridge = torch.zeros(batch, tokens, heads, width), torch.ones(heads, width)
    before = torch.zeros(batch, held, width, width)
    conjugate_chunk(keys, keys, torch.zeros(batch, tokens, held), given, before, target, ridge, 30)


CALLS: dict[str, Callable[[], None]] = {
    "step of 64": partial(step, 9, 64),
    "step of 128, float32": partial(step, 32, 128, torch.float32),
    "step of 48": partial(step, 4, 48),
    "text, 64": partial(chunk, 9, 9, 64),
    "text, 64, grouped, segments": partial(chunk, 8, 2, 64, docs=False, batch=1),
    "text, 128": partial(chunk, 8, 8, 128),
    "text, 64, float32": partial(chunk, 4, 4, 64, torch.float32),
    "text, 64, float16": partial(chunk, 4, 4, 64, torch.float16),
    "text, 32": partial(chunk, 4, 4, 32),
    "solution of 64": partial(solve, 9, 9, 64),
    "solution of 128": partial(solve, 32, 8, 128),
}
