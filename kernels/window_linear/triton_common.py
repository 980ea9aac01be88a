"""What the Triton kernels of window_linear share: documents, feature maps by rows and by columns, visibility."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def document(code):
    """Document number of a code: itself, or -1 - code where the token is padding."""
    return tl.where(code >= 0, code, -1 - code)


@triton.jit
def load_code(codes, row, position, tokens):
    """Document of one key position; what lies in front of everything belongs to document 0."""
    inside = (position >= 0) & (position < tokens)
    return document(tl.load(codes + row * tokens + position, mask=inside, other=0))


@triton.jit
def row_features(y):
    """Half of the features of projections y [C, f] times log2 e: softmax over the last axis, and log2 of the sum.

    A reader that has the logarithm gets the same features as exp2(y - log), in any layout, without looking for a
    maximum or a sum. The other half is that of -y.
    """
    top = tl.max(y, 1)
    features = tl.exp2(y - top[:, None])
    total = tl.sum(features, 1)
    return features * (1.0 / total)[:, None], top + tl.log2(total)


@triton.jit
def masked_features(y, seen, NEGATIVE: tl.constexpr):
    """The same of raw projections, or of their negatives, with zeros in rows that are not `seen`."""
    if NEGATIVE:
        top = -tl.min(y, 1) * LOG2E
        features = tl.exp2(y * -LOG2E - top[:, None])
    else:
        top = tl.max(y, 1) * LOG2E
        features = tl.exp2(y * LOG2E - top[:, None])
    total = tl.sum(features, 1)
    return features * tl.where(seen, 1.0 / total, 0.0)[:, None], top + tl.log2(total)


@triton.jit
def row_maps(y):
    """Projections [C, f] -> softmax(y), softmax(-y) over the last axis, float32, and log2 of their divisors."""
    y *= LOG2E
    up, up_lse = row_features(y)
    down, down_lse = row_features(-y)
    return up, down, up_lse, down_lse


@triton.jit
def column_maps(y):
    """The same of [f, C], over the first axis: features that enter a product as they stand, never transposed."""
    up = tl.exp2((y - tl.max(y, 0)[None, :]) * LOG2E)
    down = tl.exp2((tl.min(y, 0)[None, :] - y) * LOG2E)
    return up / tl.sum(up, 0)[None, :], down / tl.sum(down, 0)[None, :]


@triton.jit
def row_softmax(y):
    """One half of the features of [C, f]: softmax over the last axis."""
    features = tl.exp2((y - tl.max(y, 1)[:, None]) * LOG2E)
    return features / tl.sum(features, 1)[:, None]


@triton.jit
def column_softmax(y):
    """One half of the features of [f, C]: softmax over the first axis."""
    features = tl.exp2((y - tl.max(y, 0)[None, :]) * LOG2E)
    return features / tl.sum(features, 0)[None, :]


@triton.jit
def maps_backward(up, down, for_up, for_down):
    """Gradients of softmax(y) and softmax(-y) [C, f] -> gradient of y."""
    first = up * (for_up - tl.sum(up * for_up, 1)[:, None])
    return first - down * (for_down - tl.sum(down * for_down, 1)[:, None])


@triton.jit
def load_rows(x, first, rows, stride, columns, count):
    """Rows `first + rows` of a [count, columns] matrix with row stride `stride`; zeros outside.

    The tile's place is one 64-bit number for all threads, and what is left of an address the same in every tile.
    """
    inside = (rows >= -first) & (rows < count - first)
    tile = x + tl.cast(first, tl.int64) * stride
    return tl.load(tile + (rows[:, None] * stride + columns[None, :]), mask=inside[:, None], other=0.0)


@triton.jit
def load_columns(x, first, rows, stride, columns, count):
    """The same tile transposed: [columns, rows]."""
    inside = (rows >= -first) & (rows < count - first)
    tile = x + tl.cast(first, tl.int64) * stride
    return tl.load(tile + (rows[None, :] * stride + columns[:, None]), mask=inside[None, :], other=0.0)
