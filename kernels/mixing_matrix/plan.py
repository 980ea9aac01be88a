"""Sizes and configurations of one call of the mixing matrix's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.kernels.window.plan import padded

WIDEST = 256
"""Most columns of a head, or features, that the kernels take."""


@dataclass(frozen=True)
class Plan:
    """What the launches need to know beside the tensors.

    Attributes:
        batch, tokens, heads, kv_heads, map_heads, key_dim, feature_dim: sizes; `map_heads` of the keys' features.
        scaling, softcap, window: of the teacher's scores; zero for no cap, no window.
        normalized, squares: of `Products` and `Kind`.
        precision: of products of float32 operands.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    map_heads: int
    key_dim: int
    feature_dim: int
    scaling: float
    softcap: float
    window: int
    normalized: bool
    squares: bool
    precision: str


def make_plan(q: Tensor, k: Tensor, a: Tensor, b: Tensor, numbers: list[float]) -> Plan:
    """Read the sizes of q [B, T, H, K], k [B, T, N, K], a [B, T, H, F], b [B, T, M, F] and what is no tensor."""
    scaling, softcap, window, normalized, squares = numbers
    batch, tokens, heads, key_dim = q.shape
    widest = max(q.dtype.itemsize, a.dtype.itemsize)
    return Plan(
        batch, tokens, heads, k.shape[2], b.shape[2], key_dim, a.shape[-1], scaling, softcap, int(window),
        bool(normalized), bool(squares), "tf32x3" if widest == 4 else "tf32",
    )  # fmt: skip


TABLE: dict[int, tuple[int, int, int, int]] = {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)}
"""Widest padded columns of a head -> queries and keys in a tile, warps, stages."""
SINGLE: dict[int, tuple[int, int, int, int]] = {64: (32, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)}
"""The same of float32, whose products are three."""


def sizes(plan: Plan) -> dict[str, int]:
    """Tile and launch options of the kernels."""
    table = SINGLE if plan.precision == "tf32x3" else TABLE
    width = max(padded(plan.key_dim), padded(plan.feature_dim))
    queries, keys, warps, stages = table[next(size for size in sorted(table) if width <= size)]
    return {"M": queries, "N": keys, "num_warps": warps, "num_stages": stages}


def constants(plan: Plan) -> dict[str, object]:
    """What every kernel is compiled for, and the numbers that all take."""
    return {
        "tokens": plan.tokens, "window": plan.window, "scaling": plan.scaling, "cap": plan.softcap or 1.0,
        "heads": plan.heads, "kv_heads": plan.kv_heads, "map_heads": plan.map_heads, "K": plan.key_dim,
        "F": plan.feature_dim, "KP": padded(plan.key_dim), "FP": padded(plan.feature_dim),
        "HAS_WINDOW": plan.window > 0, "HAS_CAP": plan.softcap > 0, "NORMALIZED": plan.normalized,
        "SQUARES": plan.squares, "PRECISION": plan.precision,
    }  # fmt: skip
