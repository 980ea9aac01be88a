"""Calls of gated_linear_step whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.gated_linear import gated_linear_step


def call(
    dim: int,
    over: str | None = None,
    *,
    batch: int = 1,
    heads: int = 9,
    state_heads: int = 3,
    normalize: bool = False,
    bonus: bool = False,
) -> None:
    """One token of `batch` rows."""
    q = torch.zeros(batch, heads, dim, dtype=torch.bfloat16)
    k = torch.zeros(batch, state_heads, dim, dtype=torch.bfloat16)
    log_decay = None if over is None else torch.zeros(batch, state_heads, *(dim,) * (over != "head"))
    sums = torch.zeros(batch, state_heads, dim, dim)
    norms = torch.zeros(batch, state_heads, dim) if normalize else None
    extra = torch.zeros(state_heads, dim) if bonus else None
    with torch.no_grad():
        gated_linear_step(q, k, k, log_decay, sums, norms, bonus=extra, decay_values=over == "value")


CALLS: dict[str, Callable[[], None]] = {
    "no decay, normalizer": partial(call, 64, normalize=True),
    "head": partial(call, 64, "head"),
    "key, 64 rows": partial(call, 64, "key", batch=64),
    "key, bonus": partial(call, 64, "key", bonus=True),
    "value": partial(call, 64, "value"),
    "key, normalizer, 128": partial(call, 128, "key", heads=32, state_heads=8, normalize=True),
    "head, 256": partial(call, 256, "head", heads=8, state_heads=4),
}
