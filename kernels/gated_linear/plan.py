"""Sizes, tiles, segments and configurations of one call of gated_linear's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.gated_linear.periods import Periods, cut
from linearize.kernels.launch import processors

BLOCK = {"whole": 64, "halved": 16}
"""Key dimensions with their own decays that enter a product at a time; halved chunks are short of registers."""
TILES = {0: 2, 1: 2, 2: 1}
"""Tiles in a period, between whose ends states are kept: without decay, with one a head, with one a key dimension."""


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        columns: columns of the result in one program.
        warps, stages: num_warps and num_stages.
    """

    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan(Periods):
    """Everything that the launches need to know beside the tensors.

    Attributes:
        key_dim: width of a state.
        decay: 0 for none, 1 for one of a head, 2 for one of a key dimension.
        read_before: see `gated_linear_reference`.
    """

    key_dim: int
    decay: int
    read_before: bool

    @property
    def width(self) -> int:
        return self.key_dim

    @property
    def span_width(self) -> tuple[int, ...]:
        return (self.key_dim,) if self.decay == 2 else ()

    @property
    def tiles_of_period(self) -> int:
        return TILES[self.decay]

    def outputs(self, q: Tensor) -> list[Tensor]:
        """As elsewhere, and marks of chunks that were halved."""
        marks = (self.batch, self.state_heads, self.tiles) if self.decay == 2 else (0,)
        return [*super().outputs(q), q.new_empty(marks, dtype=torch.int32)]


def make_plan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, numbers: list[int]) -> Plan:
    """Work out the tiles; `numbers` as in `operator.Numbers`."""
    decay = 0 if log_decay is None else log_decay.dim() - 2
    return _plan(q, q.shape[3], k.shape[2], v.shape[3], decay, numbers)


def make_value_plan(q: Tensor, k: Tensor, v: Tensor, numbers: list[int]) -> Plan:
    """The same where values decay: they are the plan's keys."""
    return _plan(q, v.shape[3], k.shape[2], k.shape[3], 2, numbers)


def _plan(q: Tensor, key_dim: int, state_heads: int, value_dim: int, decay: int, numbers: list[int]) -> Plan:
    read_before, normalize, segments = numbers
    batch, tokens, heads = q.shape[:3]

    def room() -> int:
        columns = min(CONFIGS["scan"][_size(max(key_dim, value_dim))].columns, value_dim)
        return processors(q.device) // max(1, batch * state_heads * (value_dim // columns))

    return Plan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        state_heads=state_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=decay,
        read_before=bool(read_before),
        normalize=bool(normalize),
        wide=q.dtype != torch.bfloat16,
        precision="tf32x3" if q.dtype == torch.float32 else "tf32",
        **cut(tokens, TILES[decay], segments, room),
    )


def _size(width: int) -> int:
    return 64 if width <= 64 else 128 if width == 128 else 256


def config(kernel: str, plan: Plan) -> Config:
    """The fixed table: block of columns, warps and stages by head dim; float32 and float16 take one stage.

    Narrower blocks where one of the kind's variants would not fit into registers or shared memory. Tiles of fewer than
    64 columns take two warps: with four, wgmma of such tiles makes illegal accesses in Triton 3.6 and 3.7 (their issue
    11366, seen here on an H100), and two warps do not use it.
    """
    size = _size(max(plan.key_dim, plan.value_dim))
    found = CONFIGS[kernel][size]
    columns = found.columns
    if kernel == "head_gradient" and size == 128 and plan.normalize:
        columns = 64
    if plan.precision == "tf32x3":
        columns = min(columns, 64)
    narrowest = min(columns, plan.key_dim, plan.value_dim)
    if kernel.startswith("key_gradient"):
        narrowest = min(narrowest, key_columns(plan, kernel.removeprefix("key_gradient_")))
    return Config(columns, 2 if narrowest < 64 else found.warps, 1 if plan.wide else found.stages)


def key_columns(plan: Plan, name: str) -> int:
    """Columns of dq, dk and the decays' gradient in one program, where every key dimension has its decay."""
    return min(16 if name == "halved" else 64, plan.key_dim)


CONFIGS: dict[str, dict[int, Config]] = {
    "scan": {64: Config(64, 4, 4), 128: Config(64, 4, 3), 256: Config(64, 8, 2)},
    "head_output": {64: Config(64, 4, 2), 128: Config(128, 4, 2), 256: Config(128, 8, 1)},
    "head_gradient": {64: Config(64, 4, 2), 128: Config(128, 4, 1), 256: Config(64, 4, 1)},
    "key_output_whole": {64: Config(64, 4, 1), 128: Config(64, 4, 1), 256: Config(64, 4, 1)},
    "key_output_halved": {64: Config(32, 4, 1), 128: Config(32, 4, 1), 256: Config(32, 4, 1)},
    "value_output_whole": {64: Config(64, 4, 1), 128: Config(64, 4, 1), 256: Config(64, 4, 1)},
    "value_output_halved": {64: Config(64, 4, 1), 128: Config(64, 4, 1), 256: Config(64, 4, 1)},
    "key_gradient_whole": {64: Config(64, 4, 1), 128: Config(64, 4, 1), 256: Config(64, 4, 1)},
    "key_gradient_halved": {64: Config(32, 4, 1), 128: Config(32, 4, 1), 256: Config(32, 4, 1)},
}
