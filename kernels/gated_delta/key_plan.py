"""Tensors and configurations of gated_delta's kernels with a decay for every key dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.gated_delta.plan import CHUNK, Config, Plan

CONFIGS: dict[str, dict[int, Config]] = {
    "pairs": {256: Config(64, 64, 4, 1)},
    "transition": {64: Config(64, 64, 4, 1), 128: Config(128, 128, 8, 1), 256: Config(64, 64, 8, 1)},
    "output": {64: Config(64, 64, 4, 1), 128: Config(64, 128, 4, 1), 256: Config(64, 64, 4, 1)},
    "reader": {256: Config(64, 64, 4, 1)},
    "change": {256: Config(64, 64, 4, 1)},
    "sums": {256: Config(64, 64, 4, 1)},
}
"""Kernel -> by the wider of the head dims; tiles of 64 dims, since every one of a decay is exponentiated in float32."""


def key_config(kernel: str, plan: Plan) -> Config:
    """The fixed table; tiles no wider than what they cut.

    Tiles below 64 columns take two warps: four would make them for wgmma, which Triton 3.6 and 3.7 get wrong.
    """
    width = max(plan.key_dim, plan.value_dim)
    table = CONFIGS[kernel]
    found = table[next(size for size in sorted(table) if width <= size)]
    keys, values = min(found.keys, plan.key_dim), min(found.values, plan.value_dim)
    narrow = min(keys, values, plan.key_dim, plan.value_dim) < 64
    return Config(keys, values, min(found.warps, 2) if narrow else found.warps, found.stages)


def key_outputs(plan: Plan, q: Tensor) -> list[Tensor]:
    """Empty: out, final state, and what backward reuses.

    That is T, M of the queries, decays over chunks, P, the states that enter chunks, and how often chunks are halved.
    """
    size = (plan.batch, plan.state_heads)
    return [
        q.new_empty(plan.batch, plan.tokens, plan.heads, plan.value_dim),
        q.new_empty(*size, plan.key_dim, plan.value_dim, dtype=torch.float32),
        q.new_empty(*size, plan.chunks, CHUNK, CHUNK),
        q.new_empty(plan.batch, plan.heads, plan.chunks, CHUNK, CHUNK),
        q.new_empty(*size, plan.chunks, plan.key_dim, dtype=torch.float32),
        q.new_empty(*size, plan.chunks, plan.key_dim, plan.key_dim),
        q.new_empty(*size, plan.chunks, plan.key_dim, plan.value_dim),
        q.new_empty(*size, plan.chunks, dtype=torch.int32),
    ]


def key_pairs(plan: Plan, q: Tensor) -> Tensor:
    """Empty, for A: as the products that invert it round it, for 16-bit inputs to eleven bits, which float16 has too.

    Keys are of length one and strengths at most two, so is every number of A.
    """
    kind = torch.float32 if q.dtype == torch.float32 else torch.float16
    return q.new_empty(plan.batch, plan.state_heads, plan.chunks, CHUNK, CHUNK, dtype=kind)
