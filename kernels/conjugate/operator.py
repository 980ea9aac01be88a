"""conjugate as torch custom operators over the Triton kernels: shapes checked, kernels launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.conjugate.triton_chunk import chunk_kernel
from linearize.kernels.conjugate.triton_step import solve_kernel, step_kernel
from linearize.kernels.gated_linear.launches_states import geometry, scan
from linearize.kernels.gated_linear.periods import NAMES, cut
from linearize.kernels.gated_linear.plan import CONFIGS, Plan
from linearize.kernels.launch import launch, processors

WIDEST, SOLVED = 1024, 128
"""Columns of a row of the step, and of a matrix that one program holds."""
HOLDS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
"""Columns of a key of which one program holds a tile of 64, with the state before it."""
HELD = 2048
"""Numbers of a tensor that a program of the step has at a time."""


def covered(rest: Tensor) -> None:
    """Refuse what the step does not cover. Raises KernelError."""
    dispatch.require(
        "conjugate",
        dtype=(rest.dtype == torch.float32, f"{rest.dtype}: solutions are float32"),
        width=(rest.shape[-1] <= WIDEST, f"{rest.shape[-1]} columns, and {WIDEST} is the most"),
    )


def solves(target: Tensor) -> bool:
    """Whether one program holds a matrix."""
    return target.shape[-1] <= SOLVED and target.dtype == torch.float32


@torch.library.custom_op("linearize::conjugate_step", mutates_args=())
def step(
    made: Tensor, ridge: Tensor, x: Tensor, rest: Tensor, direction: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `chunk.conjugate_step`; contiguous tensors."""
    out = tuple(torch.empty_like(each) for each in (x, rest, direction, size))
    width = rest.shape[-1]
    padded = max(16, triton.next_power_of_2(width))
    rows, block = size.numel(), max(1, HELD // padded)
    launch(
        step_kernel, (-(-rows // block),), made=made, ridge=ridge, x=x, rest=rest, direction=direction, size=size,
        x_out=out[0], rest_out=out[1], direction_out=out[2], size_out=out[3], rows=rows, H=rest.shape[-2], F=width,
        FP=padded, R=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out[0], out[1], out[2], out[3]


@step.register_fake
def _(made, ridge, x, rest, direction, size):
    return tuple(torch.empty_like(each) for each in (x, rest, direction, size))


@torch.library.custom_op("linearize::conjugate_solve", mutates_args=())
def solve(matrix: Tensor, target: Tensor, ridge: Tensor, steps: int) -> Tensor:
    """See `recurrent.conjugate_solve`; contiguous tensors."""
    dispatch.require(
        "conjugate_solve",
        dtype=(target.dtype == torch.float32, f"{target.dtype}: solutions are float32"),
        width=(target.shape[-1] <= SOLVED, f"{target.shape[-1]} columns, and {SOLVED} is the most"),
    )
    out = torch.empty_like(target)
    batch, heads, width = target.shape
    padded = max(16, triton.next_power_of_2(width))
    launch(
        solve_kernel, (batch * heads,), matrix=matrix, target=target, ridge=ridge, out=out, steps=steps, H=heads,
        M=matrix.shape[1], F=width, FP=padded, num_warps=4 if padded <= 64 else 8, num_stages=1,
    )  # fmt: skip
    return out


@solve.register_fake
def _(matrix, target, ridge, steps):
    return torch.empty_like(target)


def holds(keys: Tensor, target: Tensor) -> bool:
    """Whether one program has all that a tile's steps read."""
    return keys.shape[-1] <= HOLDS.get(keys.dtype, 0) and target.dtype in HOLDS


@dataclass(frozen=True)
class TilePlan(Plan):
    """Of gated_linear, with a state before each tile."""

    @property
    def tiles_of_period(self) -> int:
        return 1


def make_tile_plan(target: Tensor, keys: Tensor, log_decay: Tensor | None) -> TilePlan:
    """Sizes of one call."""
    batch, tokens, state_heads, width = keys.shape
    columns = min(CONFIGS["scan"][SOLVED].columns, width)
    lines = max(1, batch * state_heads * (width // columns))
    return TilePlan(
        batch=batch,
        tokens=tokens,
        heads=target.shape[2],
        state_heads=state_heads,
        key_dim=width,
        value_dim=width,
        decay=0 if log_decay is None else 1,
        read_before=False,
        normalize=False,
        wide=keys.dtype != torch.bfloat16,
        precision="tf32x3" if keys.dtype == torch.float32 else "tf32",
        **cut(tokens, 1, 0, lambda: processors(keys.device) // lines),
    )


def chunk_triton(
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    docs: Tensor | None,
    before: Tensor | None,
    target: Tensor,
    ridge: Tensor,
    steps: int,
) -> Tensor:
    """See `chunk.conjugate_chunk`. Widths that are no power of two are filled up with zeros, which solve to zeros."""
    dispatch.require(
        "conjugate_chunk",
        dtype=(values.dtype == keys.dtype, f"{keys.dtype} and {values.dtype}: one for keys and values"),
        log_decay=(log_decay is None or log_decay.dim() == 3, "one of a head"),
        heads=(
            target.shape[2] % keys.shape[2] == 0,
            f"{target.shape[2]} must be a multiple of {keys.shape[2]} heads of the state",
        ),
    )
    width = keys.shape[-1]
    extra = max(16, triton.next_power_of_2(width)) - width
    ridge, before = ridge.float(), None if before is None else before.float()
    if extra:
        keys, values, target, ridge = (F.pad(x, (0, extra)) for x in (keys, values, target, ridge))
        before = None if before is None else F.pad(before, (0, extra, 0, extra))
    found: Tensor = chunk(keys, values, log_decay, docs, before, target, ridge, steps)
    return found[..., :width] if extra else found


@torch.library.custom_op("linearize::conjugate_chunk", mutates_args=())
def chunk(
    keys: Tensor, values: Tensor, log_decay: Tensor | None, docs: Tensor | None, before: Tensor | None,
    target: Tensor, ridge: Tensor, steps: int,
) -> Tensor:  # fmt: skip
    """See `chunk.conjugate_chunk`; F a power of two from 16 on."""
    keys, values, target, ridge = (x.contiguous() for x in (keys, values, target, ridge))
    log_decay, docs, before = (None if x is None else x.contiguous() for x in (log_decay, docs, before))
    plan, out = make_tile_plan(target, keys, log_decay), torch.empty_like(target, dtype=torch.float32)
    if not out.numel():
        return out
    stored = plan.states(keys)
    scan(plan, keys, values, None, log_decay, docs, (before, None), stored, None, reverse=False)
    launch(
        chunk_kernel, (plan.tiles, plan.batch * plan.heads), k=keys, v=values, g=log_decay, docs=docs, target=target,
        ridge=ridge, out=out, **dict(zip(NAMES, stored, strict=True)), steps=steps, **geometry(plan),
        HAS_DECAY=log_decay is not None, HAS_DOCS=docs is not None, HAS_CARRY=plan.segments > 1, WIDE=plan.wide,
        PRECISION=plan.precision, num_warps=_warps(plan.key_dim), num_stages=1,
    )  # fmt: skip
    return out


def _warps(width: int) -> int:
    """As in gated_linear's table; two for tiles of fewer than 64 columns (`gated_linear.plan.config` says why)."""
    return 2 if width < 64 else 4 if width == 64 else 8


@chunk.register_fake
def _(keys, values, log_decay, docs, before, target, ridge, steps):
    return torch.empty_like(target, dtype=torch.float32, memory_format=torch.contiguous_format)
