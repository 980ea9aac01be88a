"""Calls of window_linear with windows that are no whole chunks or differ between queries, compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.window_linear import Pins, window_linear


def call(
    dim: int,
    window: int,
    *,
    heads: int = 8,
    kv_heads: int = 8,
    least: int | None = None,
    codes: bool = False,
    batch: int = 8,
    tokens: int = 1024,
    pins: int = 0,
) -> None:
    """Forward and backward in bfloat16, maps trained; few rows and heads are scanned in segments."""

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=True)

    q = draw(batch, tokens, heads, dim)
    k, v = draw(batch, tokens, kv_heads, dim), draw(batch, tokens, kv_heads, dim)
    weights = [draw(heads, dim, 64, dtype=torch.float32) for _ in range(2)]
    given = torch.zeros(batch, tokens, dtype=torch.int32) if codes or pins else None
    pinned = Pins(pins, torch.zeros_like(given), given) if pins and given is not None else None
    reach = None if least is None else torch.full((batch, tokens), window, dtype=torch.int32)
    out, _ = window_linear(
        q, k, v, *weights, window=window, scaling=0.125, window_weight=draw(heads, dtype=torch.float32),
        codes=given, reach=reach, least=least, return_state=False, pins=pinned,
    )  # fmt: skip
    out.sum().backward()


CALLS: dict[str, Callable[[], None]] = {
    "window 48": partial(call, 64, 48),
    "window 48, documents, grouped heads, segments": partial(call, 64, 48, kv_heads=2, codes=True, batch=1),
    "terraced, 128 at most": partial(call, 64, 128, least=65),
    "window 48, dim 128": partial(call, 128, 48, kv_heads=2),
    "terraced, 128 at most, pinned": partial(call, 64, 128, least=65, heads=9, kv_heads=3, pins=4),
}
