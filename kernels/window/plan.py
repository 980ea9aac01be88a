"""Sizes and configurations of one call of the window's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 256
"""Widest head that the kernels take."""
SEGMENT = 1024
"""Queries whose part in the gradient of a pinned key one program adds up."""


@dataclass(frozen=True)
class Plan:
    """What the launches need to know beside the tensors.

    Attributes:
        batch, tokens, heads, kv_heads, key_dim, value_dim: sizes.
        window, prefix, pins: see `Seen`.
        scaling, softcap: of the scores; a cap of zero is none.
        wants_top: whether the largest scores are outputs.
        precision: of products of float32 operands.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    prefix: int
    pins: int
    scaling: float
    softcap: float
    wants_top: bool
    precision: str

    @property
    def segments(self) -> int:
        """Pieces of the text for the gradients of pinned keys."""
        return -(-self.tokens // SEGMENT)


def make_plan(q: Tensor, k: Tensor, v: Tensor, numbers: list[float]) -> Plan:
    """Read the sizes of q [B, T, H, K], k [B, P + T, N, K], v [B, P + T, N, V] and what is no tensor."""
    window, prefix, pins, scaling, softcap, wants_top = numbers
    batch, tokens, heads, key_dim = q.shape
    return Plan(
        batch, tokens, heads, k.shape[2], key_dim, v.shape[-1], int(window), int(prefix), int(pins), scaling,
        softcap, bool(wants_top), "tf32x3" if q.dtype.itemsize == 4 else "tf32",
    )  # fmt: skip


def padded(width: int) -> int:
    """Width of a tile that holds so many columns."""
    return max(16, 1 << (width - 1).bit_length())


TABLE: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "forward": {32: (64, 64, 2, 2), 64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "query": {32: (32, 64, 2, 2), 64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 8, 1)},
    "key": {32: (32, 64, 2, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (16, 32, 8, 1)},
}
"""Widest padded head dim -> queries and keys in a tile, warps, stages."""
SINGLE: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "forward": {64: (64, 32, 4, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    "query": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "key": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
"""The same of float32, whose products are three."""


def sizes(kernel: str, plan: Plan) -> dict[str, int]:
    """Constants and launch options of one kernel."""
    table = (SINGLE if plan.precision == "tf32x3" else TABLE)[kernel]
    width = max(padded(plan.key_dim), padded(plan.value_dim))
    queries, keys, warps, stages = table[next(size for size in sorted(table) if width <= size)]
    if kernel == "forward" and (plan.pins or plan.wants_top):  # these take registers
        queries = min(queries, 64)
    return {"M": queries, "N": keys, "num_warps": warps, "num_stages": stages}


def constants(plan: Plan) -> dict[str, object]:
    """What every kernel is compiled for."""
    return {
        "heads": plan.heads, "kv_heads": plan.kv_heads, "K": plan.key_dim, "V": plan.value_dim, "PINS": plan.pins,
        "KP": padded(plan.key_dim), "VP": padded(plan.value_dim), "HAS_CAP": plan.softcap > 0,
        "HAS_TOP": plan.wants_top, "PRECISION": plan.precision,
    }  # fmt: skip


def outputs(plan: Plan, q: Tensor) -> list[Tensor]:
    """Empty: out, log of the sum of weights, largest score, its key; the last two of one number unless wanted."""
    rows = (plan.batch, plan.tokens, plan.heads)
    kept = rows if plan.wants_top else (1,)
    return [
        q.new_empty(*rows, plan.value_dim),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty(kept, dtype=torch.float32),
        q.new_empty(kept, dtype=torch.int32),
    ]
