"""Calls of gated slots whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.gated_linear import gated_linear_chunk
from linearize.kernels.slots import slots_chunk, slots_step


def call(
    dim: int,
    slots: int = 64,
    *,
    heads: int = 16,
    state_heads: int = 16,
    batch: int = 8,
    tokens: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    decay_dtype: torch.dtype = torch.bfloat16,
    own_writes: bool = False,
) -> None:
    """Forward and backward."""
    size = (batch, tokens, state_heads)
    q = torch.zeros(batch, tokens, heads, dim, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(*size, dim, dtype=dtype, requires_grad=True) for _ in range(2))
    decay = torch.zeros(*size, slots, dtype=decay_dtype, requires_grad=True)
    writes = torch.zeros(*size, slots, dtype=dtype, requires_grad=True) if own_writes else None
    docs = torch.zeros(batch, tokens, dtype=torch.int64)
    state = (torch.zeros(batch, state_heads, dim, slots), torch.zeros(batch, state_heads, slots, dim))
    slots_chunk(q, k, v, writes, decay, docs, state)[0].float().sum().backward()


def values(dim: int, *, dtype: torch.dtype = torch.bfloat16, docs: bool = False) -> None:
    """The first pass alone, forward and backward."""
    q, k, v = (torch.zeros(4, 4096, 8, dim, dtype=dtype, requires_grad=True) for _ in range(3))
    decay = torch.zeros(4, 4096, 8, dim, requires_grad=True)
    given = torch.zeros(4, 4096, dtype=torch.int64) if docs else None
    out, _, _ = gated_linear_chunk(q, k, v, decay, given, None, normalize=False, decay_values=True)
    out.float().sum().backward()


def step(dim: int, slots: int = 64, *, heads: int = 4, state_heads: int = 4) -> None:
    """One token."""
    q = torch.zeros(2, heads, dim, dtype=torch.bfloat16)
    k, v = (torch.zeros(2, state_heads, dim, dtype=torch.bfloat16) for _ in range(2))
    slots_step(
        q,
        k,
        v,
        None,
        torch.zeros(2, state_heads, slots),
        torch.zeros(2, state_heads, dim, slots),
        torch.zeros(2, state_heads, slots, dim),
    )


CALLS: dict[str, Callable[[], None]] = {
    "64, 64 slots": partial(call, 64),
    "64, 64 slots, grouped, segments": partial(call, 64, heads=8, state_heads=2, batch=1, own_writes=True),
    "128, 64 slots": partial(call, 128),
    "64, 128 slots": partial(call, 64, 128, decay_dtype=torch.float32),
    "64, 32 slots": partial(call, 64, 32),
    "values, 64": partial(values, 64, docs=True),
    "values, 256": partial(values, 256),
    "step, 64": partial(step, 64),
    "step, 128, 256 slots, grouped": partial(step, 128, 256, heads=8, state_heads=2),
}
