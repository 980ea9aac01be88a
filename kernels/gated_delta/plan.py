"""Sizes and configurations of one call of gated_delta's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
CHUNK = 64
"""Tokens in a chunk: one tile of every product."""


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        keys, values: columns of keys and of values in one tile.
        warps, stages: num_warps and num_stages.
    """

    keys: int
    values: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """What the launches need to know beside the tensors.

    Attributes:
        batch, tokens, heads, state_heads, key_dim, value_dim, chunks: sizes.
        precision: of products of float32 operands, which 16-bit inputs have within T alone.
    """

    batch: int
    tokens: int
    heads: int
    state_heads: int
    key_dim: int
    value_dim: int
    chunks: int
    precision: str


def make_plan(q: Tensor, k: Tensor, v: Tensor) -> Plan:
    """Read the sizes of q [B, T, H, K], k [B, T, M, K], v [B, T, M, V]."""
    batch, tokens, heads, key_dim = q.shape
    return Plan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        state_heads=k.shape[2],
        key_dim=key_dim,
        value_dim=v.shape[-1],
        chunks=-(-tokens // CHUNK),
        precision="tf32x3" if q.dtype.itemsize == 4 else "tf32",
    )


def config(kernel: str, plan: Plan) -> Config:
    """The fixed table, by the wider of the head dims; tiles no wider than what they cut, no stages for float32.

    Heads below 64 take two warps: four would make tiles of 32 columns for wgmma, which Triton 3.6 and 3.7 get wrong.
    """
    width = max(plan.key_dim, plan.value_dim)
    table = CONFIGS[kernel]
    found = table[next(size for size in sorted(table) if width <= size)]
    keys, values = min(found.keys, plan.key_dim), min(found.values, plan.value_dim)
    warps = min(found.warps, 2) if min(plan.key_dim, plan.value_dim) < 64 else found.warps
    return Config(keys, values, warps, 1 if plan.precision == "tf32x3" else found.stages)


CONFIGS: dict[str, dict[int, Config]] = {
    "inverse": {256: Config(32, 64, 1, 1)},
    "transition": {
        32: Config(32, 32, 2, 1), 64: Config(64, 64, 4, 1), 128: Config(128, 128, 8, 1), 256: Config(64, 64, 8, 1),
    },
    "states": {
        32: Config(32, 32, 2, 3), 64: Config(64, 64, 4, 3), 128: Config(128, 64, 4, 3), 256: Config(256, 32, 8, 1),
    },
    "output": {
        32: Config(32, 32, 2, 1), 64: Config(64, 64, 4, 1), 128: Config(128, 128, 4, 1), 256: Config(256, 64, 4, 1),
    },
    "reader": {
        32: Config(32, 32, 2, 1), 64: Config(64, 64, 4, 1), 128: Config(128, 64, 4, 1), 256: Config(256, 64, 4, 1),
    },
    "change": {
        32: Config(32, 32, 2, 1), 64: Config(64, 64, 4, 1), 128: Config(128, 64, 4, 1), 256: Config(256, 64, 4, 1),
    },
    "query_gradient": {
        32: Config(32, 32, 2, 1), 64: Config(64, 64, 4, 1), 128: Config(128, 128, 4, 1), 256: Config(64, 64, 4, 1),
    },
    "key_gradient": {
        32: Config(32, 32, 2, 1), 64: Config(64, 64, 4, 1), 128: Config(64, 64, 4, 1), 256: Config(64, 64, 4, 1),
    },
}  # fmt: skip
"""A product of 64 rows whose result is an operand of another takes four warps: the rest of eight would do the same."""


def outputs(plan: Plan, q: Tensor) -> Six:
    """Empty: out, final state, and what backward reuses: T, decays over chunks, P and the states that enter chunks."""
    size = (plan.batch, plan.state_heads)
    return (
        q.new_empty(plan.batch, plan.tokens, plan.heads, plan.value_dim),
        q.new_empty(*size, plan.key_dim, plan.value_dim, dtype=torch.float32),
        q.new_empty(*size, plan.chunks, CHUNK, CHUNK),
        q.new_empty(*size, plan.chunks, dtype=torch.float32),
        q.new_empty(*size, plan.chunks, plan.key_dim, plan.key_dim),
        q.new_empty(*size, plan.chunks, plan.key_dim, plan.value_dim),
    )


def gradients(plan: Plan, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> Six:
    """Empty: of q, k, v, beta, log_decay (one number where there is none) and the carried state."""

    def empty(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    size = (plan.batch, plan.state_heads, plan.key_dim, plan.value_dim)
    dlog_decay = beta.new_empty(1) if log_decay is None else empty(log_decay)
    return (empty(q), empty(k), empty(v), empty(beta), dlog_decay, q.new_empty(size, dtype=torch.float32))
