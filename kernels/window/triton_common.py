"""What the Triton kernels of the window share: a query's run of keys, tiles, and scores."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FAR: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def run_starts(first, row, first_stride, at, queries, tokens, window, HAS_FIRST: tl.constexpr):
    """First key that each query sees; `FAR` behind the text."""
    real = queries < tokens
    if HAS_FIRST:
        return tl.load(first + row * first_stride + queries, mask=real, other=FAR)
    return tl.where(real, tl.maximum(at - window + 1, 0), FAR)


@triton.jit
def load_tile(x, rows, columns, row_stride, count, width):
    """[rows, columns] of a matrix with that row stride; zeros outside `count` rows and `width` columns."""
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < width)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_turned(x, rows, columns, row_stride, count, width):
    """The same tile as [columns, rows]."""
    inside = ((rows >= 0) & (rows < count))[None, :] & (columns < width)[:, None]
    return tl.load(x + rows.to(tl.int64)[None, :] * row_stride + columns[:, None], mask=inside, other=0.0)


@triton.jit
def capped(score, cap, HAS_CAP: tl.constexpr):
    """cap tanh(score / cap)."""
    if HAS_CAP:
        score = cap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E / cap)) + 1.0))
    return score
