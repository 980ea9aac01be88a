"""Calls of gated_linear whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.gated_linear import gated_linear_chunk, gated_linear_step


def call(
    dim: int,
    over: str | None = None,
    *,
    heads: int = 4,
    state_heads: int = 4,
    normalize: bool = False,
    docs: bool = False,
    read_before: bool = False,
    bonus: bool = False,
    carried: bool = False,
    batch: int = 8,
    tokens: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    decay_dtype: torch.dtype = torch.float32,
) -> None:
    """Forward and backward; few rows and heads are scanned in segments."""
    size = (batch, tokens, state_heads)
    q = torch.zeros(batch, tokens, heads, dim, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(*size, dim, dtype=dtype, requires_grad=True) for _ in range(2))
    decay = None
    if over is not None:
        decay = torch.zeros(*size, *(dim,) * (over == "key"), dtype=decay_dtype, requires_grad=True)
    given = torch.zeros(batch, tokens, dtype=torch.int64) if docs else None
    state = None
    if carried:
        state = (
            torch.zeros(batch, state_heads, dim, dim),
            torch.zeros(batch, state_heads, dim) if normalize else None,
        )
    own = torch.zeros(state_heads, dim, requires_grad=True) if bonus else None
    out, denominator, _ = gated_linear_chunk(
        q, k, v, decay, given, state, bonus=own, normalize=normalize, read_before=read_before
    )
    total = out.float().sum()
    (total if denominator is None else total + denominator.sum()).backward()


def step(
    dim: int,
    over: str | None = None,
    *,
    heads: int = 4,
    state_heads: int = 4,
    normalize: bool = True,
    bonus: bool = False,
) -> None:
    """One token."""
    widths = {"head": (), "key": (dim,), "value": (dim,)}
    q = torch.zeros(2, heads, dim, dtype=torch.bfloat16)
    k, v = (torch.zeros(2, state_heads, dim, dtype=torch.bfloat16) for _ in range(2))
    gated_linear_step(
        q,
        k,
        v,
        None if over is None else torch.zeros(2, state_heads, *widths[over]),
        torch.zeros(2, state_heads, dim, dim),
        torch.zeros(2, state_heads, dim) if normalize else None,
        bonus=torch.zeros(state_heads, dim) if bonus else None,
        decay_values=over == "value",
    )


CALLS: dict[str, Callable[[], None]] = {
    "none, 64": partial(call, 64, heads=16, state_heads=16),
    "none, 128": partial(call, 128, heads=16, state_heads=16, batch=2, tokens=16384),
    "none, 128, normalizer, documents, segments": partial(call, 128, normalize=True, docs=True, batch=1),
    "head, 64": partial(call, 64, "head", heads=16, state_heads=16),
    "head, 64, normalizer, documents, grouped": partial(
        call, 64, "head", heads=8, state_heads=2, normalize=True, docs=True, carried=True
    ),
    "head, 128": partial(call, 128, "head", heads=16, state_heads=16),
    "head, 128, normalizer, documents, segments": partial(
        call, 128, "head", normalize=True, docs=True, batch=1, read_before=True
    ),
    "head, 256": partial(call, 256, "head"),
    "head, 64, float32": partial(call, 64, "head", dtype=torch.float32),
    "key, 64": partial(call, 64, "key", heads=16, state_heads=16, decay_dtype=torch.bfloat16),
    "key, 64, normalizer, documents": partial(
        call, 64, "key", heads=16, state_heads=16, normalize=True, docs=True
    ),
    "key, 64, grouped, segments": partial(call, 64, "key", heads=8, state_heads=2, carried=True, batch=1),
    "key, 64, before, documents": partial(call, 64, "key", docs=True, carried=True, read_before=True),
    "key, 64, bonus, documents": partial(
        call, 64, "key", heads=16, state_heads=16, docs=True, carried=True, bonus=True
    ),
    "key, 128": partial(call, 128, "key", heads=16, state_heads=16),
    "key, 128, normalizer, documents, segments": partial(
        call, 128, "key", normalize=True, docs=True, batch=1
    ),
    "key, 256": partial(call, 256, "key"),
    "key, 64, float16": partial(call, 64, "key", dtype=torch.float16),
    "step, none, 64": partial(step, 64),
    "step, head, 128, grouped": partial(step, 128, "head", heads=8, state_heads=2),
    "step, key, 128, bonus": partial(step, 128, "key", normalize=False, bonus=True),
    "step, value, 64": partial(step, 64, "value", normalize=False),
}
