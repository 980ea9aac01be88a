"""Sizes, tiles, segments and configurations of one call of taylor_linear's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.gated_linear.periods import Periods, cut
from linearize.kernels.launch import processors

TILES = 4
"""Tiles in a period, between whose ends states are kept.

A state is read and written in 4 F V operations a token; products with the keys of half a period cost P (D + V). With
F = 153 and D = 16 both are equal at P = 480, and states of 256 tokens are a quarter of the bytes of q, k, v and o.
"""
DIMS = (8, 16, 32)
"""Widths of q and k that the kernels take."""


def features(dim: int) -> int:
    """Values of phi(x) for x of width `dim`."""
    return 1 + dim + dim * (dim + 1) // 2


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        features, values: features and columns of values that enter a product, or stand in an accumulator, at a time.
        warps, stages: num_warps and num_stages.
    """

    features: int
    values: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan(Periods):
    """Everything that the launches need to know beside the tensors.

    Attributes:
        value_heads: heads of v.
        dim: width of q and k.
        scale: factor on q.k.
    """

    value_heads: int
    dim: int
    scale: float

    @property
    def width(self) -> int:
        return features(self.dim)


def make_plan(q: Tensor, k: Tensor, v: Tensor, scale: float, numbers: list[int]) -> Plan:
    """Work out the tiles; `numbers` as in `operator.Numbers`."""
    normalize, segments = numbers
    batch, tokens, heads, dim = q.shape
    state_heads, value_dim = k.shape[2], v.shape[3]

    def room() -> int:
        made = CONFIGS["scan"][0]
        blocks = -(-features(dim) // made.features) * -(-value_dim // made.values)
        # a program of the scan waits for memory most of the time: three of them share a processor
        return 3 * processors(q.device) // max(1, batch * state_heads * blocks)

    return Plan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        state_heads=state_heads,
        value_heads=v.shape[2],
        dim=dim,
        value_dim=value_dim,
        scale=scale,
        normalize=bool(normalize),
        wide=q.dtype != torch.bfloat16,
        precision="tf32" if q.dtype == torch.bfloat16 else "tf32x3",
        **cut(tokens, TILES, segments, room),
    )


def config(kernel: str, plan: Plan) -> Config:
    """The fixed table: bfloat16, and what is wide.

    Products with a side below 64 take two warps: with four, wgmma of such tiles makes illegal accesses in Triton 3.6
    and 3.7 (their issue 11366), and two warps do not use it. Where q and k are the side, that is always.
    """
    found = CONFIGS[kernel][int(plan.wide)]
    values = min(found.values, plan.value_dim)
    if kernel == "product" and plan.dim > 16:
        values = min(values, 32)  # q and k take the registers
    return Config(found.features, values, 2 if values < 64 else found.warps, found.stages)


CONFIGS: dict[str, tuple[Config, Config]] = {
    "scan": (Config(64, 64, 4, 2), Config(32, 64, 4, 1)),
    "value": (Config(32, 64, 2, 1), Config(32, 32, 2, 1)),
    "product": (Config(16, 64, 2, 1), Config(16, 16, 2, 1)),
}
