"""Calls of taylor_linear whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.taylor_linear import taylor_linear_chunk, taylor_linear_step
from linearize.kernels.taylor_linear.plan import features


def call(
    dim: int = 16,
    value_dim: int = 64,
    *,
    heads: int = 9,
    state_heads: int = 9,
    value_heads: int = 3,
    normalize: bool = True,
    masked: bool = False,
    carried: bool = False,
    batch: int = 64,
    tokens: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward; few rows and heads are scanned in segments."""
    rows = (batch, tokens)
    q = torch.zeros(*rows, heads, dim, dtype=dtype, requires_grad=True)
    k = torch.zeros(*rows, state_heads, dim, dtype=dtype, requires_grad=True)
    v = torch.zeros(*rows, value_heads, value_dim, dtype=dtype, requires_grad=True)
    docs = torch.zeros(rows, dtype=torch.int64) if masked else None
    valid = torch.ones(rows, dtype=torch.bool) if masked else None
    state = None
    if carried:
        sums = torch.zeros(batch, state_heads, features(dim), value_dim)
        state = (sums, torch.zeros_like(sums[..., 0]) if normalize else None)
    out, total, _ = taylor_linear_chunk(q, k, v, dim**-0.5, docs, valid, state, normalize=normalize)
    loss = out.float().sum()
    (loss if total is None else loss + total.sum()).backward()


def step(
    dim: int = 16, value_dim: int = 64, *, batch: int = 64, state_heads: int = 9, normalize: bool = True
) -> None:
    """One token of `batch` rows."""
    q, k = (torch.zeros(batch, heads, dim, dtype=torch.bfloat16) for heads in (9, state_heads))
    v = torch.zeros(batch, 3, value_dim, dtype=torch.bfloat16)
    sums = torch.zeros(batch, state_heads, features(dim), value_dim)
    norms = torch.zeros_like(sums[..., 0]) if normalize else None
    taylor_linear_step(q, k, v, dim**-0.5, sums, norms, valid=torch.ones(batch, dtype=torch.bool))


CALLS: dict[str, Callable[[], None]] = {
    "dim 16": partial(call, masked=True, carried=True),
    "dim 16, no masks": partial(call, heads=16, state_heads=16, value_heads=16, batch=8, tokens=8192),
    "dim 16, values 128, grouped, segments": partial(
        call, value_dim=128, heads=8, state_heads=2, value_heads=2, masked=True, batch=1, tokens=16_384
    ),
    "dim 16, values 256": partial(call, value_dim=256, batch=8),
    "dim 16, sums only": partial(call, normalize=False),
    "dim 8": partial(call, dim=8, masked=True),
    "dim 32": partial(call, dim=32, masked=True, carried=True),
    "dim 16, float32": partial(call, dtype=torch.float32, masked=True),
    "dim 16, float16": partial(call, dtype=torch.float16, masked=True),
    "dim 32, values 128, float32": partial(call, dim=32, value_dim=128, dtype=torch.float32),
    "step": step,
    "step, one row": partial(step, batch=1, state_heads=3),
    "step, dim 32, values 128": partial(step, dim=32, value_dim=128),
    "step, dim 8, sums only": partial(step, dim=8, normalize=False),
}
