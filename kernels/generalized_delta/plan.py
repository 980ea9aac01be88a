"""Sizes and configurations of one call of generalized_delta's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.gated_delta.plan import Config

CHUNK = 64
"""Tokens in a chunk: one tile of every product."""
BLOCK = 64
"""Widest tile of key dimensions with their own decays, and of values."""


@dataclass(frozen=True)
class Plan:
    """What the launches need to know beside the tensors.

    Attributes:
        batch, tokens, heads, state_heads, key_dim, value_dim, chunks: sizes.
        wide: whether tiles under their decays are float32, which float16 could not hold.
        precision: of products of float32 operands.
    """

    batch: int
    tokens: int
    heads: int
    state_heads: int
    key_dim: int
    value_dim: int
    chunks: int
    wide: bool
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
        wide=q.dtype != torch.bfloat16,
        precision="tf32x3" if q.dtype.itemsize == 4 else "tf32",
    )


def config(kernel: str, plan: Plan) -> Config:
    """The fixed table, by the wider of the head dims; tiles no wider than what they cut, no stages for float32.

    Tiles of fewer than 64 columns take two warps: four would use wgmma, which Triton 3.6 and 3.7 get wrong for them.
    """
    width = max(plan.key_dim, plan.value_dim)
    warps, stages = 4, 1
    keys, values = min(BLOCK, plan.key_dim), min(BLOCK, plan.value_dim)
    if kernel == "states":
        keys = plan.key_dim
        values = min(32 if width > 128 else 64, plan.value_dim)
        stages = 3 if width <= 128 and not plan.wide else 1
        if width > 128:
            return Config(keys, values, 8, stages)
    return Config(keys, values, 2 if min(plan.key_dim, plan.value_dim) < 64 else warps, stages)


def outputs(plan: Plan, q: Tensor, save: bool) -> list[Tensor]:
    """Empty: out, final state, and what backward reuses.

    These are marks of halved chunks, decays over chunks, P, the states that enter chunks, M, Y, T, X and [q, b], in the
    letters of `triton_forward`; none of them but the first two where there will be no backward pass.
    """

    def per_chunk(heads: int, *size: int, dtype: torch.dtype = q.dtype) -> Tensor:
        return q.new_empty(plan.batch, heads, plan.chunks, *size, dtype=dtype)

    own, state_heads = plan.heads, plan.state_heads
    made = [
        q.new_empty(plan.batch, plan.tokens, own, plan.value_dim),
        q.new_empty(plan.batch, state_heads, plan.key_dim, plan.value_dim, dtype=torch.float32),
    ]
    if save:
        made += [
            *shared(plan, q),
            per_chunk(state_heads, CHUNK, CHUNK),
            per_chunk(state_heads, CHUNK, CHUNK),
            per_chunk(own, CHUNK, CHUNK),
        ]
    return made


def shared(plan: Plan, q: Tensor) -> list[Tensor]:
    """Empty: what the kernels of the forward pass hand on to each other, from the marks to Y."""

    def per_chunk(heads: int, *size: int, dtype: torch.dtype = q.dtype) -> Tensor:
        return q.new_empty(plan.batch, heads, plan.chunks, *size, dtype=dtype)

    return [
        per_chunk(plan.state_heads, dtype=torch.int32),
        per_chunk(plan.state_heads, plan.key_dim, dtype=torch.float32),
        per_chunk(plan.state_heads, plan.key_dim, plan.key_dim),
        per_chunk(plan.state_heads, plan.key_dim, plan.value_dim),
        per_chunk(plan.heads, CHUNK, CHUNK),
        per_chunk(plan.heads, CHUNK, plan.key_dim),
    ]


def gradients(plan: Plan, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Empty: of q, k, v, a, b, log_decay and the carried state."""
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    size = (plan.batch, plan.state_heads, plan.key_dim, plan.value_dim)
    return [*made, inputs[0].new_empty(size, dtype=torch.float32)]
