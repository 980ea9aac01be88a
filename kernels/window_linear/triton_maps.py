"""Gradients of the projections of window_linear's feature maps, from those of the projected tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def map_gradient_kernel(
    x, dy, out, count, per_split, splits,
    x_heads: tl.constexpr, heads: tl.constexpr, K: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x^T dy of one head over one share of the tokens: [splits, H, K, F], summed by the caller in a fixed order."""
    split, head = tl.program_id(0), tl.program_id(1)
    x_head = head // (heads // x_heads)
    rows, dims, columns = tl.arange(0, C), tl.arange(0, K), tl.arange(0, F)
    total = tl.zeros([K, F], tl.float32)
    begin = split * per_split
    end = tl.minimum(begin + per_split, count)
    for first in range(begin, end, C):
        place = tl.cast(first, tl.int64) + rows
        inside = place < end
        left = tl.load(
            x + (place[None, :] * x_heads + x_head) * K + dims[:, None], mask=inside[None, :], other=0.0
        )
        right = tl.load(
            dy + (place[:, None] * heads + head) * F + columns[None, :], mask=inside[:, None], other=0.0
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    to = (tl.cast(split, tl.int64) * heads + head) * K * F + dims[:, None] * F + columns[None, :]
    tl.store(out + to, total)
