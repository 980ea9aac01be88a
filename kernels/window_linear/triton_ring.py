"""What one token sees of a ring and of the pinned keys in front of it, and how it looks at them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
REVOLUTION: tl.constexpr = tl.constexpr(6.283185307179586)


@triton.jit
def load_rotated(x, cosine, sine, dims, K: tl.constexpr, R: tl.constexpr):
    """One vector of width K, its first R numbers rotated by halves, rounded to its own dtype as the model's own is."""
    value = tl.load(x + dims, mask=dims < K, other=0.0)
    if R > 0:
        inside = dims < R
        partner = tl.where(dims < R // 2, dims + R // 2, dims - R // 2)
        other = tl.load(x + tl.where(inside, partner, 0), mask=inside, other=0.0).to(tl.float32)
        other = tl.where(dims < R // 2, -other, other)
        c = tl.load(cosine + dims, mask=inside, other=1.0).to(tl.float32)
        s = tl.load(sine + dims, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * c + other * s).to(value.dtype)
    return value.to(tl.float32)


@triton.jit
def ring_tile(ring_k, ring_v, ring_valid, first, slot, reach, dims, values, key, fresh, here, k_stride, v_stride,
              K: tl.constexpr, V: tl.constexpr, SLOTS: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """Keys [BW, KP], values [BW, BV] of ages `first` and up, and which of them are seen; age 0 is the token itself."""
    age = first + tl.arange(0, BW)
    at = slot - age
    at = tl.where(at < 0, at + SLOTS, at)
    inside = (age > 0) & (age < reach)
    inside = inside & (tl.load(ring_valid + at, mask=inside, other=0) != 0)
    held = (age > 0) & (age < SLOTS)
    rows = tl.load(
        ring_k + at[:, None] * k_stride + dims[None, :], mask=held[:, None] & (dims < K)[None, :], other=0.0
    )
    kept = tl.load(
        ring_v + at[:, None] * v_stride + values[None, :],
        mask=held[:, None] & (values < V)[None, :],
        other=0.0,
    )
    own = age == 0
    rows = tl.where(own[:, None], key[None, :].to(rows.dtype), rows)
    kept = tl.where(own[:, None], fresh[None, :].to(kept.dtype), kept)
    return rows, kept, inside | (own & (here != 0))


@triton.jit
def attend(query, rows, kept, inside, top, total, numerator, scaling, cap, HAS_CAP: tl.constexpr):
    """One tile of the window's softmax, added to what the tiles before gave."""
    score = tl.sum(rows.to(tl.float32) * query[None, :], 1) * scaling
    if HAS_CAP:
        score = cap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E / cap)) + 1.0))
    score = tl.where(inside, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 0))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.where(inside, tl.exp2((score - safe) * LOG2E), 0.0)
    shrink = tl.exp2((top - safe) * LOG2E)
    total = total * shrink + tl.sum(weight, 0)
    numerator = numerator * shrink + tl.sum(weight[:, None] * kept.to(tl.float32), 0)
    return higher, total, numerator


@triton.jit
def load_turned_back(x, more, turns, dims, K: tl.constexpr, R: tl.constexpr):
    """One rotated vector, turned back by `more` tokens of `turns` [R / 2] radians each; angles are float64."""
    value = tl.load(x + dims, mask=dims < K, other=0.0).to(tl.float32)
    inside = dims < R
    pair = tl.where(dims < R // 2, dims, dims - R // 2)
    partner = tl.where(dims < R // 2, dims + R // 2, dims - R // 2)
    other = tl.load(x + tl.where(inside, partner, 0), mask=inside, other=0.0).to(tl.float32)
    other = tl.where(dims < R // 2, other, -other)
    rounds = more.to(tl.float64) * (tl.load(turns + pair, mask=inside, other=0.0) / REVOLUTION)
    angle = ((rounds - tl.floor(rounds)) * REVOLUTION).to(tl.float32)
    return tl.where(inside, value * tl.cos(angle) + other * tl.sin(angle), value)


@triton.jit
def attend_pinned_slots(
    asks, pin_k, pin_v, pinned, top, total, numerator, scaling, cap, dims, values, k_stride, v_stride,
    K: tl.constexpr, V: tl.constexpr, PP: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The first `pinned` slots, added to what the ring gave; whoever comes now takes a later one, and is not read."""
    order = tl.arange(0, PP)
    there = order < pinned
    rows = tl.load(
        pin_k + order[:, None] * k_stride + dims[None, :],
        mask=there[:, None] & (dims < K)[None, :],
        other=0.0,
    )
    kept = tl.load(
        pin_v + order[:, None] * v_stride + values[None, :],
        mask=there[:, None] & (values < V)[None, :],
        other=0.0,
    )
    return attend(asks, rows, kept, there, top, total, numerator, scaling, cap, HAS_CAP)
