"""conjugate as torch custom operators over the Triton kernels: shapes checked, kernels launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.conjugate.triton_step import solve_kernel, step_kernel
from linearize.kernels.launch import launch

WIDEST, SOLVED = 1024, 128
"""Columns of a row of the step, and of a matrix that one program holds."""
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
    return out


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
