"""Calls of window_linear_step whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from linearize.kernels.window_linear.recurrent import Ring, window_linear_step


def call(
    dim: int = 64,
    *,
    batch: int = 1,
    heads: int = 9,
    kv_heads: int = 3,
    state_heads: int = 0,
    window: int = 64,
    block: int = 0,
    map_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    first: int = 0,
    turned: bool = False,
) -> None:
    """One token of `batch` rows."""
    slots = (2 * window if block else window) + 1
    q, k = (torch.zeros(batch, n, dim, dtype=dtype) for n in (heads, kv_heads))
    held = [torch.zeros(batch, first + slots, kv_heads, dim, dtype=dtype) for _ in range(2)]
    valid, count = (
        torch.zeros(batch, first + slots, dtype=torch.bool),
        torch.zeros(batch, heads, dtype=torch.int64),
    )
    ring = None
    if window:
        ring = Ring(*held, valid, count, count.clone() if block else None, block, slots - 1, first)
    if ring is not None and turned:
        turns = torch.ones(dim // 2, dtype=torch.float64)
        ring = replace(ring, since=torch.zeros(batch, dtype=torch.int64), turns=turns, most=1024)
    state_heads = state_heads or heads
    width = 2 * map_dim
    state = torch.zeros(batch, state_heads, width, dim), torch.zeros(batch, state_heads, width)
    maps = [torch.zeros(n, dim, map_dim) for n in (heads, state_heads)]
    factor = torch.zeros(heads) if window else None
    with torch.no_grad():
        window_linear_step(q, k, k, *maps, scaling=0.125, ring=ring, state=state, window_factor=factor)


CALLS: dict[str, Callable[[], None]] = {
    "one row": call,
    "64 rows": partial(call, batch=64),
    "state shared by a group": partial(call, state_heads=3),
    "terraced": partial(call, block=64),
    "window 512": partial(call, window=512),
    "no window": partial(call, window=0),
    "dim 128": partial(call, 128, heads=32, kv_heads=8),
    "dim 128, wide maps": partial(call, 128, heads=32, kv_heads=8, map_dim=128),
    "dim 256": partial(call, 256, heads=8, kv_heads=4),
    "pinned": partial(call, first=4, turned=True),
    "pinned, terraced": partial(call, block=64, first=4, batch=64),
    "float32": partial(call, dtype=torch.float32),
}
