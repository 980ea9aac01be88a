"""Calls of window_linear whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.window_linear import Pins, window_linear


def call(
    dim: int,
    *,
    window: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    codes: bool = False,
    map_dim: int = 64,
    batch: int = 1,
    tokens: int = 4096,
    pins: int = 0,
    asking: bool = False,
    frozen: bool = False,
) -> None:
    """Forward and backward in bfloat16, maps trained; `frozen`: nothing else, as in attention transfer."""

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=True)

    q = draw(batch, tokens, heads, dim).requires_grad_(not frozen)
    k, v = (draw(batch, tokens, kv_heads, dim).requires_grad_(not frozen) for _ in range(2))
    weights = [draw(heads, dim, map_dim, dtype=torch.float32) for _ in range(2)]
    weight = draw(heads, dtype=torch.float32) if window else None
    given = torch.zeros(batch, tokens, dtype=torch.int32) if codes or pins else None
    pinned = None
    if pins and given is not None:
        pinned = Pins(
            pins, torch.zeros_like(given), given, draw(batch, tokens, heads, dim) if asking else None
        )
    out, _ = window_linear(
        q, k, v, *weights, window=window, scaling=0.125, window_weight=weight, codes=given, return_state=False,
        pins=pinned,
    )  # fmt: skip
    out.sum().backward()


CALLS: dict[str, Callable[[], None]] = {
    "dim 64": partial(call, 64),
    "dim 64, documents, grouped heads, segments": partial(
        call, 64, heads=9, kv_heads=3, codes=True, tokens=1024
    ),
    "dim 64, no window": partial(call, 64, window=0),
    "dim 128": partial(call, 128, heads=8, kv_heads=2),
    "dim 64, transfer": partial(
        call, 64, heads=9, kv_heads=3, codes=True, batch=16, tokens=1024, frozen=True
    ),
    "dim 128, transfer": partial(call, 128, heads=8, kv_heads=2, frozen=True),
    "dim 64, window of two chunks": partial(call, 64, window=128),
    "dim 64, pinned, grouped heads": partial(call, 64, heads=9, kv_heads=3, pins=4, batch=8, tokens=1024),
    "dim 64, pinned, seen from afar, segments": partial(call, 64, heads=9, kv_heads=3, pins=4, asking=True),
    "dim 64, pinned, transfer": partial(
        call, 64, heads=9, kv_heads=3, pins=4, batch=8, tokens=1024, frozen=True
    ),
    "dim 64, pinned, window of two chunks": partial(call, 64, window=128, pins=4),
}
