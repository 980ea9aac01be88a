"""Sizes and configurations of one call of the Triton kernels of stretches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.gated_delta.plan import CHUNK, Config

__all__ = ["CHUNK", "Config", "Matrices", "Plan", "config", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What the launches need to know beside the tensors.

    Attributes:
        batch, tokens, heads, state_heads, key_dim, value_dim, chunks: sizes.
        bits: tokens in a block, as a power of two.
        levels: states of stretches; `older`: whether there is one of the whole past too.
        most: the last level, on which what is older lies.
        delta: whether there are strengths, of the delta rule.
        precision: of products of float32 operands, which 16-bit inputs have within T alone.
    """

    batch: int
    tokens: int
    heads: int
    state_heads: int
    key_dim: int
    value_dim: int
    chunks: int
    bits: int
    levels: int
    older: bool
    most: int
    delta: bool
    precision: str

    @property
    def states(self) -> int:
        """S, states of a head."""
        return self.levels + self.older

    def state_size(self) -> tuple[int, ...]:
        """[B, M, S, K, V]."""
        return self.batch, self.state_heads, self.states, self.key_dim, self.value_dim

    def stored(self, q: Tensor) -> Tensor:
        """Empty states of all chunks [B, M, S, chunks, K, V], in the dtype of q."""
        batch, heads, states, *square = self.state_size()
        return q.new_empty(batch, heads, states, self.chunks, *square)


def make_plan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, shares: Tensor, numbers: list[int]
) -> Plan:
    """Read the sizes of q [B, T, H, K], k [B, T, M, K], v [B, T, M, V]; `numbers` are bits, levels and older."""
    batch, tokens, heads, key_dim = q.shape
    bits, levels, older = numbers[:3]
    return Plan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        state_heads=k.shape[2],
        key_dim=key_dim,
        value_dim=v.shape[-1],
        chunks=-(-tokens // CHUNK),
        bits=bits,
        levels=levels,
        older=bool(older),
        most=shares.shape[-1] - 1,
        delta=beta is not None,
        precision="tf32x3" if q.dtype.itemsize == 4 else "tf32",
    )


def config(kernel: str, plan: Plan) -> Config:
    """The fixed table, by the wider of the head dims; see `gated_delta.plan.config`."""
    width = max(plan.key_dim, plan.value_dim)
    found = CONFIGS[kernel][next(size for size in sorted(CONFIGS[kernel]) if width <= size)]
    values = min(found.values, plan.value_dim)
    warps = min(found.warps, 2) if min(plan.key_dim, plan.value_dim) < 64 else found.warps
    return Config(plan.key_dim, values, warps, 1 if plan.precision == "tf32x3" else found.stages)


SAME = {32: Config(32, 32, 2, 1), 64: Config(64, 64, 4, 1), 128: Config(128, 64, 8, 1)}
CONFIGS: dict[str, dict[int, Config]] = {
    "matrices": SAME,
    "write": SAME,
    "states": {32: Config(32, 32, 2, 3), 64: Config(64, 64, 4, 3), 128: Config(128, 64, 4, 3)},
    "sums": {32: Config(32, 16, 2, 1), 64: Config(64, 16, 4, 1), 128: Config(128, 16, 4, 1)},
    "output": SAME,
    "reader": SAME,
    "value_gradient": SAME,
    "weight_gradient": SAME,
    "query_gradient": SAME,
    "solve_gradient": SAME,
    "reader_gradient": SAME,
    "writer_gradient": SAME,
    "pair_gradient": SAME,
}
"""Keys are never cut. The loop over chunks has no product where nothing is taken out (`sums`): narrow tiles, so that
programs of one text are many."""


@dataclass(frozen=True)
class Matrices:
    """What every chunk does; `triton_matrices` says what each is.

    Attributes:
        inverse: T [B, M, chunks, C, C], or None without the delta rule.
        kept: [B, M, chunks], float32.
        weights: [B, H, chunks, C, C].
        readers: [B, H, chunks, C, K].
        writers: [B, M, chunks, K, C].
        removal: -P [B, M, chunks, K, K], or None without the delta rule.
    """

    inverse: Tensor | None
    kept: Tensor
    weights: Tensor
    readers: Tensor
    writers: Tensor
    removal: Tensor | None

    @classmethod
    def empty(cls, plan: Plan, q: Tensor) -> Matrices:
        """Of the plan's size, in the dtype of q."""
        size, of_heads = (plan.batch, plan.state_heads, plan.chunks), (plan.batch, plan.heads, plan.chunks)
        square = (plan.key_dim, plan.key_dim)
        return cls(
            inverse=q.new_empty(*size, CHUNK, CHUNK) if plan.delta else None,
            kept=q.new_empty(size, dtype=torch.float32),
            weights=q.new_empty(*of_heads, CHUNK, CHUNK),
            readers=q.new_empty(*of_heads, CHUNK, plan.key_dim),
            writers=q.new_empty(*size, plan.key_dim, CHUNK),
            removal=q.new_empty(*size, *square) if plan.delta else None,
        )
