"""A program of the step owns some rows, one of the whole solution a query head: its matrix stays where it computes."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(0.25)
TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest float32 that is not subnormal: nothing is divided by zero."""


@triton.jit
def scale(size):
    """See `reference.scale`: [R] -> [R, 1]."""
    return tl.exp2(-tl.floor(0.5 * tl.log2(size + TINY)))[:, None]


@triton.jit
def step_kernel(
    made, ridge, x, rest, direction, size, x_out, rest_out, direction_out, size_out, rows,
    H: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Everything of a step but the product with H, read once and written once."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    dims = tl.arange(0, FP)
    there = row < rows
    seen = there[:, None] & (dims < F)[None, :]
    place = row[:, None] * F + dims[None, :]
    along = tl.load(direction + place, mask=seen, other=0.0).to(tl.float32)
    diagonal = tl.load(ridge + (row % H)[:, None] * F + dims[None, :], mask=seen, other=0.0)
    turned = tl.load(made + place, mask=seen, other=0.0).to(tl.float32) + along * diagonal
    before = tl.load(size + row, mask=there, other=0.0)
    held = scale(before)
    least = LOWEST * tl.sum(along * along, 1)
    length = (before / (tl.maximum(tl.sum(along * turned, 1), least) + TINY))[:, None] * held
    found = tl.load(x + place, mask=seen, other=0.0) + length * along
    left = tl.load(rest + place, mask=seen, other=0.0) - length * turned
    after = tl.sum(left * left, 1)
    along = left + (after / (before + TINY))[:, None] / held * along
    tl.store(x_out + place, found, mask=seen)
    tl.store(rest_out + place, left, mask=seen)
    tl.store(direction_out + place, (scale(after) * along).to(direction_out.dtype.element_ty), mask=seen)
    tl.store(size_out + row, after, mask=there)


@triton.jit
def solve_kernel(
    matrix, target, ridge, out, steps,
    H: tl.constexpr, M: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
):  # fmt: skip
    """All steps of one query head; the matrix is symmetric, so its rows are its columns."""
    program = tl.program_id(0).to(tl.int64)
    head = program % H
    dims = tl.arange(0, FP)
    seen = dims < F
    square = matrix + (program // H * M + head // (H // M)) * F * F
    held = tl.load(
        square + dims[:, None] * F + dims[None, :], mask=seen[:, None] & seen[None, :], other=0.0
    ).to(tl.float32)
    diagonal = tl.load(ridge + head * F + dims, mask=seen, other=0.0)
    left = tl.load(target + program * F + dims, mask=seen, other=0.0)
    found = tl.zeros([FP], tl.float32)
    along = left
    before = tl.sum(left * left, 0)
    for _ in range(steps):
        turned = tl.sum(held * along[None, :], 1) + along * diagonal
        least = LOWEST * tl.sum(along * along, 0)
        length = before / (tl.maximum(tl.sum(along * turned, 0), least) + TINY)
        found += length * along
        left -= length * turned
        after = tl.sum(left * left, 0)
        along = left + after / (before + TINY) * along
        before = after
    tl.store(out + program * F + dims, found, mask=seen)
