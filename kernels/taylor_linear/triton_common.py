"""What the Triton kernels of taylor_linear share: features made where they are used, documents and padding, states.

A tile of features is made of two reads of x, which lies in the first cache, and goes with the product that it enters.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def feature_table(block, root, D: tl.constexpr, BF: tl.constexpr):
    """Features `block * BF ..`: which x_i and which x_j they multiply, whether they have any, and their weight.

    The order is that of `taylor_features`: 1, x, pairs i <= j row by row; behind the last one the weight is zero.

    Args:
        root: sqrt(scale).
    """
    pairs: tl.constexpr = D * (D + 1) // 2
    place = block * BF + tl.arange(0, BF)
    pair = tl.minimum(tl.maximum(place - 1 - D, 0), pairs - 1)
    # row i begins at pair i D - i (i - 1) / 2; 0.015 is less than half of what parts a row's last pair from the next
    side: tl.constexpr = 2.0 * D + 1.0
    row = (0.5 * (side - tl.sqrt(side * side - 8.0 * pair.to(tl.float32))) + 0.015).to(tl.int32)
    column = pair - (row * D - row * (row - 1) // 2) + row
    linear, paired = (place >= 1) & (place <= D), (place > D) & (place < 1 + D + pairs)
    first = tl.where(linear, place - 1, row)
    weight = tl.where(paired, tl.where(row == column, 0.7071067811865476, 1.0) * (root * root), 0.0)
    weight = tl.where(linear, root, tl.where(place == 0, 1.0, weight))
    return first, column, linear | paired, paired, weight


@triton.jit
def load_factors(x, place, stride, inside, first, second, has_first, has_second):
    """The two factors of a tile of features [tokens, BF], ones where there is none; float32."""
    rows = place[:, None] * stride
    a = tl.load(x + (rows + first[None, :]), mask=inside[:, None] & has_first[None, :], other=1.0)
    b = tl.load(x + (rows + second[None, :]), mask=inside[:, None] & has_second[None, :], other=1.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def load_factors_turned(x, place, stride, inside, first, second, has_first, has_second):
    """The same tile transposed: [BF, tokens]."""
    columns = place[None, :] * stride
    a = tl.load(x + (columns + first[:, None]), mask=inside[None, :] & has_first[:, None], other=1.0)
    b = tl.load(x + (columns + second[:, None]), mask=inside[None, :] & has_second[:, None], other=1.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def load_rows(x, place, stride, columns, tokens, WIDTH: tl.constexpr):
    """Rows of a matrix at distance `stride`; zeros outside of its `tokens` rows and WIDTH columns."""
    inside = (place < tokens)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(x + place[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_columns(x, place, stride, columns, tokens, WIDTH: tl.constexpr):
    """The same tile transposed: [columns, rows]."""
    inside = (place < tokens)[None, :] & (columns < WIDTH)[:, None]
    return tl.load(x + place[None, :] * stride + columns[:, None], mask=inside, other=0.0)


@triton.jit
def load_code(codes, batch, position, tokens):
    """A token's document, or -1 less it on padding; 0 in front of the first one, nothing new behind the last."""
    at = tl.minimum(position, tokens - 1)
    return tl.load(codes + batch * tokens + at, mask=at >= 0, other=0).to(tl.int32)


@triton.jit
def document(code):
    """Of a `load_code`."""
    return tl.where(code < 0, -1 - code, code)


@triton.jit
def load_state(
    stored, line, period, periods, segment, segments, places, inside,
    SIZE: tl.constexpr, HAS_CARRY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A part of a stored state, or of a norm, with what entered its segment; SIZE numbers a state.

    `stored` is the states, their carries and the spans: zero, or minus infinity once the segment's document has ended.
    """
    states, carries, spans = stored[0], stored[1], stored[2]
    at = line * periods + period
    state = tl.load(states + at * SIZE + places, mask=inside, other=0.0)
    if HAS_CARRY:
        first = segment == segments - 1 if REVERSE else segment == 0
        if not first:
            carry = tl.load(carries + (line * segments + segment) * SIZE + places, mask=inside, other=0.0)
            kept = tl.exp2(tl.load(spans + at))
            state = (state.to(tl.float32) + carry.to(tl.float32) * kept).to(state.dtype)
    return state
