"""Calls of gated_delta whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.gated_delta import delta_chunk, delta_step


def call(
    dim: int,
    *,
    value_dim: int | None = None,
    decay: bool = True,
    per_key: bool = False,
    heads: int = 4,
    state_heads: int = 4,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward of two chunks with documents."""

    def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=True)

    q = draw(1, 128, heads, dim)
    k, v = draw(1, 128, state_heads, dim), draw(1, 128, state_heads, value_dim or dim)
    beta = draw(1, 128, state_heads, dtype=torch.float32)
    kind = dtype if per_key else torch.float32
    log_decay = draw(1, 128, state_heads, *[dim] * per_key, dtype=kind) if decay else None
    docs = torch.zeros(1, 128, dtype=torch.int64)
    start = torch.zeros(1, state_heads, dim, value_dim or dim)
    out, state = delta_chunk(q, k, v, beta, log_decay, docs, start)
    (out.sum() + state.sum()).backward()


def step(
    dim: int, *, decay: bool = True, per_key: bool = False, heads: int = 4, state_heads: int = 4
) -> None:
    """One token."""
    q = torch.zeros(2, heads, dim, dtype=torch.bfloat16)
    k = v = torch.zeros(2, state_heads, dim, dtype=torch.bfloat16)
    beta = torch.zeros(2, state_heads)
    log_decay = torch.zeros(2, state_heads, *[dim] * per_key) if decay else None
    delta_step(q, k, v, beta, log_decay, torch.zeros(2, state_heads, dim, dim))


CALLS: dict[str, Callable[[], None]] = {
    "dim 64": partial(call, 64),
    "dim 64, no decay": partial(call, 64, decay=False),
    "dim 64, grouped heads": partial(call, 64, heads=8),
    "dim 128": partial(call, 128),
    "dim 128, no decay": partial(call, 128, decay=False),
    "dim 256": partial(call, 256),
    "per key, dim 64": partial(call, 64, per_key=True),
    "per key, dim 64, grouped heads": partial(call, 64, per_key=True, heads=8),
    "per key, dim 64, float16": partial(call, 64, per_key=True, dtype=torch.float16),
    "per key, dim 64, float32": partial(call, 64, per_key=True, dtype=torch.float32),
    "per key, dim 32": partial(call, 32, per_key=True),
    "per key, dim 128": partial(call, 128, per_key=True),
    "per key, dims 128 and 64": partial(call, 128, value_dim=64, per_key=True),
    "per key, dim 256": partial(call, 256, per_key=True),
    "one token, dim 64": partial(step, 64),
    "one token, dim 64, per key": partial(step, 64, per_key=True),
    "one token, dim 128, no decay, grouped heads": partial(step, 128, decay=False, heads=6, state_heads=2),
}
