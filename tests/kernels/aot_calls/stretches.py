"""Calls of stretches whose launches are compiled ahead of time: chunks, carrying, and steps of live heads alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.gated_delta import delta_step
from linearize.kernels.gated_linear import gated_linear_step
from linearize.kernels.stretches import Stretches, carry, stretches_chunk


def chunks(
    dim: int,
    *,
    value_dim: int | None = None,
    delta: bool = True,
    decay: bool = True,
    heads: int = 2,
    older: bool = False,
) -> None:
    """Forward and backward of two chunks, from a state."""

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=True)

    rows, values = (1, 128, 2), value_dim or dim
    q, k, v = draw(1, 128, heads, dim), draw(*rows, dim), draw(*rows, values)
    beta = draw(*rows, dtype=torch.float32) if delta else None
    log_decay = draw(*rows, dtype=torch.float32) if decay else None
    shares, docs = draw(1, 128, heads, 12, dtype=torch.float32), torch.zeros(1, 128, dtype=torch.int64)
    stretches, before = Stretches(16, 4, older), torch.zeros(1, dtype=torch.int64)
    state = torch.zeros(1, stretches.count, 2, dim, values) if older else None
    out, after = stretches_chunk(
        q, k, v, beta, log_decay, shares, torch.arange(128)[None], docs, stretches, before, state
    )
    (out.sum() + (0 if after is None else after.sum())).backward()


def carried() -> None:
    """Twelve levels of 9 heads of 64 x 64."""
    carry(torch.zeros(2, 12, 9, 64, 64), torch.zeros(2, dtype=torch.int64))


def delta() -> None:
    """A token of the delta rule."""
    q = torch.zeros(2, 108, 64, dtype=torch.bfloat16)
    live = torch.ones(2, 108, dtype=torch.bool)
    delta_step(q, q, q, torch.zeros(2, 108), torch.zeros(2, 108), torch.zeros(2, 108, 64, 64), live)


def linear() -> None:
    """A token of gated linear attention."""
    q = torch.zeros(2, 108, 64, dtype=torch.bfloat16)
    live, sums = torch.ones(2, 108, dtype=torch.bool), torch.zeros(2, 108, 64, 64)
    gated_linear_step(q, q, q, torch.zeros(2, 108, 64), sums, torch.zeros(2, 108, 64), live=live)


CALLS: dict[str, Callable[[], None]] = {
    "chunks, dim 64": partial(chunks, 64),
    "chunks, dim 64, grouped heads": partial(chunks, 64, heads=6),
    "chunks, dim 64, older": partial(chunks, 64, older=True),
    "chunks, dim 64, no decay": partial(chunks, 64, decay=False),
    "chunks, dim 64, additive": partial(chunks, 64, delta=False),
    "chunks, dim 128": partial(chunks, 128),
    "chunks, dim 128, additive": partial(chunks, 128, delta=False),
    "carry": carried,
    "delta rule, live heads": delta,
    "linear, live heads": linear,
}
