"""Calls of the window whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.window import Seen
from linearize.kernels.window.operator import window_triton
from linearize.kernels.window.recurrent import Held
from linearize.kernels.window.triton_step import window_step_triton


def call(
    dim: int,
    window: int = 64,
    *,
    masked: bool = False,
    pins: int = 0,
    top: bool = False,
    softcap: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward of a few blocks; with pinned keys of two segments."""
    tokens = 2048 if pins > 4 else 256

    def draw(heads: int) -> torch.Tensor:
        return torch.zeros(1, tokens, heads, dim, dtype=dtype, requires_grad=True)

    first = torch.zeros(1, tokens, dtype=torch.int32)
    seen = Seen(window, 0, first if masked or pins else None, first if pins else None, pins)
    made = window_triton(draw(4), draw(2), draw(2), seen, scaling=1.0, softcap=softcap, wants_top=top)
    sum(x.float().sum() for x in made if x is not None).backward()


def step(dim: int, window: int = 64, *, first: int = 0) -> None:
    """One token."""
    q = torch.zeros(2, 1, 4, dim, dtype=torch.bfloat16)
    k = v = torch.zeros(2, 1, 2, dim, dtype=torch.bfloat16)
    held = Held(
        torch.zeros(2, first + window + 1, 2, dim, dtype=torch.bfloat16),
        torch.zeros(2, first + window + 1, 2, dim, dtype=torch.bfloat16),
        torch.zeros(2, first + window + 1, dtype=torch.bool),
        torch.zeros(2, 4, dtype=torch.int64),
        first,
    )
    valid = torch.ones(2, 1, dtype=torch.bool)
    window_step_triton(q, k, v, held, valid=valid, span=window, scaling=1.0)


CALLS: dict[str, Callable[[], None]] = {
    "dim 64": partial(call, 64),
    "dim 64, documents, maximum": partial(call, 64, masked=True, top=True),
    "dim 64, pinned": partial(call, 64, pins=4, top=True),
    "dim 64, pinned, segments": partial(call, 64, pins=8, top=True),
    "dim 64, soft cap": partial(call, 64, softcap=30.0),
    "dim 64, float32": partial(call, 64, dtype=torch.float32),
    "dim 128, window 256": partial(call, 128, 256, masked=True, top=True),
    "dim 128, float32": partial(call, 128, dtype=torch.float32, top=True),
    "dim 256, window 512": partial(call, 256, 512, masked=True, top=True),
    "dim 256, window 4,096, pinned": partial(call, 256, 4096, pins=20),
    "dim 256, float32": partial(call, 256, dtype=torch.float32, top=True),
    "dim 32": partial(call, 32, masked=True),
    "one token": partial(step, 64),
    "one token, pinned": partial(step, 128, first=4),
    "one token, dim 256, window 4,096": partial(step, 256, 4096),
    "one token, window 2,048, pinned": partial(step, 64, 2048, first=4),
}
