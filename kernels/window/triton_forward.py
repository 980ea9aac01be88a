"""Forward: one program for a block of queries of one head, keys in tiles, whatever the window's length."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window.triton_common import FAR, LOG2E, capped, load_tile, load_turned, run_starts


@triton.jit
def attend(
    query, keys, values, key, visible, top, total, sums, place, scaling, cap, k_stride, v_stride, count, dims,
    columns, K: tl.constexpr, V: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys, added to what the tiles before gave."""
    turned = load_turned(keys, key, dims, k_stride, count, K)
    score = capped(tl.dot(query, turned, input_precision=PRECISION) * scaling, cap, HAS_CAP)
    score = tl.where(visible, score, float("-inf"))
    highest = tl.max(score, 1)
    if HAS_TOP:
        best = tl.min(tl.where((score == highest[:, None]) & visible, key[None, :], FAR), 1)
        place = tl.where(highest > top, best, place)
    higher = tl.maximum(top, highest)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2((score - safe[:, None]) * LOG2E)
    shrink = tl.exp2((top - safe) * LOG2E)
    total = total * shrink + tl.sum(weight, 1)
    value = load_tile(values, key, columns, v_stride, count, V)
    sums = sums * shrink[:, None]
    sums = tl.dot(weight.to(value.dtype), value, sums, input_precision=PRECISION)
    return higher, total, sums, place


@triton.jit
def forward_kernel(
    q, k, v, first, pin, sink, out, log_sum, top_out, place_out,
    tokens, prefix, window, first_stride, pin_stride, scaling, cap,
    heads: tl.constexpr, kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PINS: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out, the log of the sum of weights, and with HAS_TOP the largest score and the key that has it (-1: the sink)."""
    blocks = tl.cdiv(tokens, M)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    queries = block * M + tl.arange(0, M)
    at = prefix + queries
    dims, columns, tile = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, N)
    count = prefix + tokens
    k_stride: tl.constexpr = kv_heads * K
    v_stride: tl.constexpr = kv_heads * V
    kv_head = head // (heads // kv_heads)
    keys = k + row * count * k_stride + kv_head * K
    values = v + row * count * v_stride + kv_head * V
    query = load_tile(q + row * tokens * heads * K + head * K, queries, dims, heads * K, tokens, K)
    low = run_starts(first, row, first_stride, at, queries, tokens, window, HAS_FIRST)
    begin = tl.min(low, 0) // N * N
    end = tl.minimum(count, prefix + block * M + M)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if HAS_SINK:
        top = tl.zeros([M], tl.float32) + tl.load(sink + head).to(tl.float32)
        total += 1.0
    place = tl.full([M], -1, tl.int32)
    sums = tl.zeros([M, VP], tl.float32)
    if PINS > 0:
        pinned = tl.load(pin + row * pin_stride + queries, mask=queries < tokens, other=FAR)
        lead = tl.min(pinned, 0)
        for start in range(lead, tl.minimum(lead + PINS, begin), N):
            key = start + tile
            visible = (
                (key[None, :] >= pinned[:, None])
                & (key[None, :] < pinned[:, None] + PINS)
                & (key < begin)[None, :]
            )
            top, total, sums, place = attend(
                query, keys, values, key, visible, top, total, sums, place, scaling, cap, k_stride, v_stride,
                count, dims, columns, K, V, HAS_CAP, HAS_TOP, PRECISION,
            )  # fmt: skip
    for start in range(begin, end, N):
        key = start + tile
        visible = key[None, :] >= low[:, None]
        if PINS > 0:
            visible |= (key[None, :] >= pinned[:, None]) & (key[None, :] < pinned[:, None] + PINS)
        visible &= key[None, :] <= at[:, None]
        top, total, sums, place = attend(
            query, keys, values, key, visible, top, total, sums, place, scaling, cap, k_stride, v_stride,
            count, dims, columns, K, V, HAS_CAP, HAS_TOP, PRECISION,
        )  # fmt: skip
    some = total > 0
    sums = sums * tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
    real = queries < tokens
    lines = (row * tokens + queries) * heads + head
    inside = real[:, None] & (columns < V)[None, :]
    tl.store(out + lines[:, None] * V + columns[None, :], sums.to(out.dtype.element_ty), mask=inside)
    summed = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)) / LOG2E, float("-inf"))
    tl.store(log_sum + lines, summed, mask=real)
    if HAS_TOP:
        tl.store(top_out + lines, tl.where(some, top, 0.0), mask=real)
        tl.store(place_out + lines, place, mask=real)
