"""Calls of generalized_delta, which RWKV-7's rule and Gated DeltaNet-2's make, compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.generalized_delta import generalized_delta_chunk, generalized_delta_step


def call(
    dim: int, *, heads: int = 4, state_heads: int = 4, dtype: torch.dtype = torch.bfloat16, train: bool = True
) -> None:
    """Forward, and backward if `train`, of two chunks with documents."""

    def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=train)

    size = (1, 128, state_heads, dim)
    q, (k, v, a, b) = draw(1, 128, heads, dim), (draw(*size) for _ in range(4))
    log_decay = draw(*size, dtype=torch.float32)
    docs = torch.zeros(1, 128, dtype=torch.int64)
    start = torch.zeros(1, state_heads, dim, dim)
    out, state = generalized_delta_chunk(q, k, v, a, b, log_decay, docs, start)
    if train:
        (out.sum() + state.sum()).backward()


def step(dim: int, *, heads: int = 4, state_heads: int = 4) -> None:
    """One token."""
    q = torch.zeros(2, heads, dim, dtype=torch.bfloat16)
    k = torch.zeros(2, state_heads, dim, dtype=torch.bfloat16)
    generalized_delta_step(q, k, k, k, k, k.float(), torch.zeros(2, state_heads, dim, dim))


CALLS: dict[str, Callable[[], None]] = {
    "dim 64": partial(call, 64),
    "dim 64, forward": partial(call, 64, train=False),
    "dim 64, grouped heads": partial(call, 64, heads=8),
    "dim 128": partial(call, 128),
    "dim 256": partial(call, 256),
    "one token, dim 64": partial(step, 64),
    "one token, dim 128, grouped heads": partial(step, 128, heads=6, state_heads=2),
}
