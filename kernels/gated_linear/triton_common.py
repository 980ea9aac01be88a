"""What the Triton kernels of gated_linear share: tiles, documents, decays that keep their digits, states."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FLOOR: tl.constexpr = tl.constexpr(-192.0)
"""A decay of one token by less than 2^-192 is zero in float32 as 2^-192 is."""


@triton.jit
def load_rows(x, first, rows, stride, columns, count):
    """Rows `first + rows` of a matrix of `count` rows at distance `stride`; zeros outside."""
    place = first + rows
    return tl.load(x + place[:, None] * stride + columns[None, :], mask=(place < count)[:, None], other=0.0)


@triton.jit
def load_columns(x, first, rows, stride, columns, count):
    """The same tile transposed: [columns, rows]."""
    place = first + rows
    return tl.load(x + place[None, :] * stride + columns[:, None], mask=(place < count)[None, :], other=0.0)


@triton.jit
def load_document(docs, batch, position, tokens):
    """Document of a token; in front of the first one is document 0, behind the last one nothing begins."""
    at = tl.minimum(position, tokens - 1)
    return tl.load(docs + batch * tokens + at, mask=at >= 0, other=0).to(tl.int32)


@triton.jit
def load_decay(g, place, inside, stride):
    """Log decays of one head in base 2; zero, which keeps everything, outside."""
    x = tl.load(g + place * stride, mask=inside, other=0.0).to(tl.float32)
    return tl.maximum(x * LOG2E, FLOOR)


@triton.jit
def in_two(x):
    """Multiples of 1/16, whose sums float32 keeps exactly, and the small rest.

    So the difference of two sums is as good as the sum of the terms between them, also behind strong decays.
    """
    coarse = tl.floor(x * 16.0 + 0.5) * 0.0625
    return coarse, x - coarse


@triton.jit
def coordinates(g, first, rows, start, tokens, stride, SPAN: tl.constexpr):
    """Sums of log decays from `start` up to and with each row, and the rows' own, each in two parts."""
    coarse, fine = in_two(load_decay(g, first + rows, first + rows < tokens, stride))
    earlier = start + tl.arange(0, SPAN)
    before, before_fine = in_two(load_decay(g, earlier, (earlier < first) & (earlier < tokens), stride))
    return tl.cumsum(coarse, 0) + tl.sum(before, 0), tl.cumsum(fine, 0) + tl.sum(before_fine, 0), coarse, fine


@triton.jit
def load_state(
    stored, line, period, periods, segment, segments, square, features,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, HAS_CARRY: tl.constexpr, REVERSE: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """A stored state, or a part of it, with what entered its segment: places `square`, rows or columns `features`.

    `stored` is states, norms, carries, carry_norms, spans.
    """
    states, carries, spans = stored[0], stored[2], stored[4]
    at = line * periods + period
    state = tl.load(states + at * K * V + square)
    if HAS_CARRY:
        first = segment == segments - 1 if REVERSE else segment == 0
        if not first:
            origin = line * segments + segment
            carry = tl.load(carries + origin * K * V + square).to(tl.float32)
            if DECAY == 2:
                kept = tl.exp2(tl.load(spans + at * K + features))
                if TURNED:
                    carry *= kept[None, :]
                else:
                    carry *= kept[:, None]
            else:
                carry *= tl.exp2(tl.load(spans + at))
            state = (state.to(tl.float32) + carry).to(state.dtype)
    return state


@triton.jit
def load_norm(
    stored, line, period, periods, segment, segments, features,
    K: tl.constexpr, DECAY: tl.constexpr, HAS_CARRY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The same of the running sum of keys."""
    norms, carry_norms, spans = stored[1], stored[3], stored[4]
    at = line * periods + period
    norm = tl.load(norms + at * K + features)
    if HAS_CARRY:
        first = segment == segments - 1 if REVERSE else segment == 0
        if not first:
            carry = tl.load(carry_norms + (line * segments + segment) * K + features)
            if DECAY == 2:
                carry *= tl.exp2(tl.load(spans + at * K + features))
            else:
                carry *= tl.exp2(tl.load(spans + at))
            norm += carry
    return norm


@triton.jit
def in_halves(x):
    """Log decays as a sum of two float16, whose products with 0 and 1 a tensor core adds up without loss."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)
