"""Backward for queries: dq, and what the keys' kernel needs of each row, with keys in tiles as in forward."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window.triton_common import FAR, LOG2E, capped, load_tile, load_turned, run_starts


@triton.jit
def score_gradient(
    score, weight, dweight, key, shift, place, dtop, cap, HAS_CAP: tl.constexpr, HAS_TOP: tl.constexpr
):
    """Of the scores [M, N] before the cap: softmax's own, and the largest score's where it is an output."""
    found = weight * (dweight - shift[:, None])
    if HAS_TOP:
        found += tl.where(key[None, :] == place[:, None], dtop[:, None], 0.0)
    if HAS_CAP:
        found *= 1.0 - (score / cap) * (score / cap)
    return found


@triton.jit
def add_keys(
    query, dout, keys, values, key, visible, log_sum, shift, place, dtop, dquery, scaling, cap, k_stride, v_stride,
    count, dims, columns, K: tl.constexpr, V: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dq."""
    turned = load_turned(keys, key, dims, k_stride, count, K)
    score = capped(tl.dot(query, turned, input_precision=PRECISION) * scaling, cap, HAS_CAP)
    weight = tl.exp2(tl.where(visible, score - log_sum[:, None], float("-inf")) * LOG2E)
    value = load_turned(values, key, columns, v_stride, count, V)
    dweight = tl.dot(dout, value, input_precision=PRECISION)
    dscore = score_gradient(score, weight, dweight, key, shift, place, dtop, cap, HAS_CAP, HAS_TOP)
    dscore = tl.where(visible, dscore, 0.0).to(query.dtype)
    return tl.dot(dscore, load_tile(keys, key, dims, k_stride, count, K), dquery, input_precision=PRECISION)


@triton.jit
def query_kernel(
    q, k, v, first, pin, out, log_sum, place, dout, dlog_sum, dtop, dq, shift_out,
    tokens, prefix, window, first_stride, pin_stride, scaling, cap,
    heads: tl.constexpr, kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PINS: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SUM: tl.constexpr, HAS_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and each row's shift: do . o less the gradient of the log of the sum."""
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
    real = queries < tokens
    lines = (row * tokens + queries) * heads + head
    query = load_tile(q + row * tokens * heads * K + head * K, queries, dims, heads * K, tokens, K)
    place_of_values = row * tokens * heads * V + head * V
    gradient = load_tile(dout + place_of_values, queries, columns, heads * V, tokens, V)
    made = load_tile(out + place_of_values, queries, columns, heads * V, tokens, V)
    shift = tl.sum(gradient.to(tl.float32) * made.to(tl.float32), 1)
    total = tl.load(log_sum + lines, mask=real, other=float("-inf"))
    total = tl.where(total == float("-inf"), 0.0, total)
    if HAS_SUM:
        shift -= tl.load(dlog_sum + lines, mask=real, other=0.0)
    tl.store(shift_out + lines, shift, mask=real)
    best, dbest = queries, shift
    if HAS_TOP:
        best = tl.load(place + lines, mask=real, other=-1)
        dbest = tl.load(dtop + lines, mask=real, other=0.0)
    low = run_starts(first, row, first_stride, at, queries, tokens, window, HAS_FIRST)
    begin = tl.min(low, 0) // N * N
    end = tl.minimum(count, prefix + block * M + M)
    dquery = tl.zeros([M, KP], tl.float32)
    gradient = gradient.to(query.dtype)
    if PINS > 0:
        pinned = tl.load(pin + row * pin_stride + queries, mask=real, other=FAR)
        lead = tl.min(pinned, 0)
        for start in range(lead, tl.minimum(lead + PINS, begin), N):
            key = start + tile
            visible = (
                (key[None, :] >= pinned[:, None])
                & (key[None, :] < pinned[:, None] + PINS)
                & (key < begin)[None, :]
            )
            dquery = add_keys(
                query, gradient, keys, values, key, visible, total, shift, best, dbest, dquery, scaling, cap,
                k_stride, v_stride, count, dims, columns, K, V, HAS_CAP, HAS_TOP, PRECISION,
            )  # fmt: skip
    for start in range(begin, end, N):
        key = start + tile
        visible = key[None, :] >= low[:, None]
        if PINS > 0:
            visible |= (key[None, :] >= pinned[:, None]) & (key[None, :] < pinned[:, None] + PINS)
        visible &= key[None, :] <= at[:, None]
        dquery = add_keys(
            query, gradient, keys, values, key, visible, total, shift, best, dbest, dquery, scaling, cap,
            k_stride, v_stride, count, dims, columns, K, V, HAS_CAP, HAS_TOP, PRECISION,
        )  # fmt: skip
    tl.store(
        dq + lines[:, None] * K + dims[None, :], (dquery * scaling).to(dq.dtype.element_ty),
        mask=real[:, None] & (dims < K)[None, :],
    )  # fmt: skip
