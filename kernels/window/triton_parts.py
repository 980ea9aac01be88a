"""Long rings: several programs share a key head of a row, and each reads every so-manieth tile for all its query heads.

A key is read once. What the programs found is joined by those that make the answers (`triton_step`), and the new token
takes its slot there, which no program reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window.triton_common import LOG2E, capped


@triton.jit
def part_kernel(
    q, valid, reach, ring_k, ring_v, ring_valid, counter, parts_top, parts_total, parts_sums, scaling, cap, span,
    heads: tl.constexpr, kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FIRST: tl.constexpr,
    SLOTS: tl.constexpr, GP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, W: tl.constexpr,
    PARTS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_REACH: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Sums, weight and maximum of one part of the ring's keys, for the query heads of one key head."""
    part = tl.program_id(1)
    kv_head = tl.program_id(0) % kv_heads
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    group: tl.constexpr = heads // kv_heads
    lanes, dims, columns, tile = tl.arange(0, GP), tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, W)
    held: tl.constexpr = FIRST + SLOTS
    k_stride: tl.constexpr = kv_heads * K
    v_stride: tl.constexpr = kv_heads * V
    here = 1
    if HAS_VALID:
        here = tl.load(valid + row).to(tl.int32)
    slot = (tl.load(counter + row * heads) % SLOTS).to(tl.int32)
    sees = span
    if HAS_REACH:
        sees = tl.load(reach + row).to(tl.int32)
    keys = ring_k + (row * held + FIRST) * k_stride + kv_head * K
    values = ring_v + (row * held + FIRST) * v_stride + kv_head * V
    flags = ring_valid + row * held + FIRST
    line = row * heads + kv_head * group + lanes
    query = tl.load(
        q + line[:, None] * K + dims[None, :], mask=(lanes < group)[:, None] & (dims < K)[None, :], other=0.0
    )
    top = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    sums = tl.zeros([GP, VP], tl.float32)
    # a tile's flags are read while the one before it is worked on: its keys wait for nothing
    flag = tl.load(flags + part * W + tile, mask=part * W + tile < SLOTS, other=0).to(tl.int32)
    for start in range(part * W, SLOTS, PARTS * W):
        at = start + tile
        after = at + PARTS * W
        ahead = tl.load(flags + after, mask=after < SLOTS, other=0).to(tl.int32)
        # padding has no slot yet: the last token of the row is one slot back
        age = (slot - at + SLOTS) % SLOTS + here - 1
        stood = (at < SLOTS) & (at != slot) & (age < sees) & (flag != 0)
        place = at.to(tl.int64)[:, None]
        near_k = tl.load(
            keys + place * k_stride + dims[None, :], mask=stood[:, None] & (dims < K)[None, :], other=0.0
        )
        near_v = tl.load(
            values + place * v_stride + columns[None, :],
            mask=stood[:, None] & (columns < V)[None, :],
            other=0.0,
        )
        score = tl.dot(query, tl.trans(near_k).to(query.dtype), input_precision="ieee") * scaling
        score = tl.where(stood[None, :], capped(score, cap, HAS_CAP), float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2((score - safe[:, None]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        total = total * shrink + tl.sum(weight, 1)
        near = tl.dot(weight.to(near_v.dtype), near_v, input_precision="ieee")
        sums = sums * shrink[:, None] + near
        top = higher
        flag = ahead
    place = line * PARTS + part
    tl.store(parts_top + place, top, mask=lanes < group)
    tl.store(parts_total + place, total, mask=lanes < group)
    tl.store(
        parts_sums + place[:, None] * V + columns[None, :],
        sums,
        mask=(lanes < group)[:, None] & (columns < V)[None, :],
    )


@triton.jit
def join_parts(
    parts_top, parts_total, parts_sums, line, top, total, sums, columns,
    V: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """What a query head has found so far, and what PARTS programs found for it."""
    part = tl.arange(0, PP)
    place = line * PARTS + part
    tops = tl.load(parts_top + place, mask=part < PARTS, other=float("-inf"))
    totals = tl.load(parts_total + place, mask=part < PARTS, other=0.0)
    found = tl.load(
        parts_sums + place[:, None] * V + columns[None, :],
        mask=(part < PARTS)[:, None] & (columns < V)[None, :],
        other=0.0,
    )
    higher = tl.maximum(top, tl.max(tops, 0))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2((tops - safe) * LOG2E)
    shrink = tl.exp2((top - safe) * LOG2E)
    total = total * shrink + tl.sum(weight * totals, 0)
    return higher, total, sums * shrink + tl.sum(weight[:, None] * found, 0)
