"""Backward for keys and values: one program for a block of keys, with the queries that see them in tiles.

A key of the window is seen by the next `window` queries. A pinned one is seen by its whole document: the block that
holds it reads on to the end of its own segment of queries, and what later segments add has been summed up for each of
them by a kernel before (`segment_kernel`), so that no program's loop grows with the text.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window.triton_common import FAR, LOG2E, capped, load_tile, load_turned, run_starts


@triton.jit
def add_queries(
    key_tile, value_tile, key, heads_q, heads_out, lines, queries, visible, log_sum, shift, place, dtop, dkey, dvalue,
    scaling, cap, q_stride, out_stride, tokens, dims, columns, K: tl.constexpr, V: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_TOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dk and dv; everything as [keys, queries]."""
    real = queries < tokens
    total = tl.load(log_sum + lines, mask=real, other=0.0)
    moved = tl.load(shift + lines, mask=real, other=0.0)
    turned = load_turned(heads_q, queries, dims, q_stride, tokens, K)
    score = capped(tl.dot(key_tile, turned, input_precision=PRECISION) * scaling, cap, HAS_CAP)
    weight = tl.exp2(tl.where(visible, score - total[None, :], float("-inf")) * LOG2E)
    gradient = load_tile(heads_out, queries, columns, out_stride, tokens, V).to(key_tile.dtype)
    dvalue = tl.dot(weight.to(key_tile.dtype), gradient, dvalue, input_precision=PRECISION)
    turned_gradient = load_turned(heads_out, queries, columns, out_stride, tokens, V).to(key_tile.dtype)
    dweight = tl.dot(value_tile, turned_gradient, input_precision=PRECISION)
    dscore = weight * (dweight - moved[None, :])
    if HAS_TOP:
        best = tl.load(place + lines, mask=real, other=-1)
        dbest = tl.load(dtop + lines, mask=real, other=0.0)
        dscore += tl.where(key[:, None] == best[None, :], dbest[None, :], 0.0)
    if HAS_CAP:
        dscore *= 1.0 - (score / cap) * (score / cap)
    dscore = tl.where(visible, dscore, 0.0).to(key_tile.dtype)
    query = load_tile(heads_q, queries, dims, q_stride, tokens, K)
    return tl.dot(dscore, query, dkey, input_precision=PRECISION), dvalue


@triton.jit
def key_kernel(
    q, k, v, first, pin, log_sum, place, shift, dout, dtop, later_k, later_v, dk, dv,
    tokens, prefix, window, first_stride, pin_stride, scaling, cap, segments,
    heads: tl.constexpr, kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PINS: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TOP: tl.constexpr, HAS_LATER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one key-value head."""
    count = prefix + tokens
    blocks = tl.cdiv(count, N)
    block = tl.program_id(0) % blocks
    kv_head = (tl.program_id(0) // blocks) % kv_heads
    row = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    group: tl.constexpr = heads // kv_heads
    begin = block * N
    key = begin + tl.arange(0, N)
    dims, columns, tile = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, M)
    k_stride: tl.constexpr = kv_heads * K
    v_stride: tl.constexpr = kv_heads * V
    q_stride: tl.constexpr = heads * K
    out_stride: tl.constexpr = heads * V
    key_tile = load_tile(k + row * count * k_stride + kv_head * K, key, dims, k_stride, count, K)
    value_tile = load_tile(v + row * count * v_stride + kv_head * V, key, columns, v_stride, count, V)
    dkey = tl.zeros([N, KP], tl.float32)
    dvalue = tl.zeros([N, VP], tl.float32)
    earliest = tl.maximum(begin - prefix, 0) // M * M
    near = tl.minimum(tokens, begin + N - 1 - prefix + window)
    latest = near
    if PINS > 0:
        own = tl.load(pin + row * pin_stride + tl.maximum(key - prefix, 0), mask=key < count, other=FAR)
        holds = tl.max(((key >= own) & (key < own + PINS)).to(tl.int32), 0) > 0
        own_segment = tl.maximum(key - prefix, 0) // SEGMENT
        segment_end = (tl.max(own_segment, 0) + 1) * SEGMENT
        latest = tl.where(holds, tl.maximum(near, tl.minimum(tokens, segment_end)), near)
    for member in range(group):
        head = kv_head * group + member
        heads_q = q + row * tokens * q_stride + head * K
        heads_out = dout + row * tokens * out_stride + head * V
        for start in range(earliest, latest, M):
            queries = start + tile
            at = prefix + queries
            low = run_starts(first, row, first_stride, at, queries, tokens, window, HAS_FIRST)
            visible = key[:, None] >= low[None, :]
            if PINS > 0:
                pinned = tl.load(pin + row * pin_stride + queries, mask=queries < tokens, other=FAR)
                far = (key[:, None] >= pinned[None, :]) & (key[:, None] < pinned[None, :] + PINS)
                visible |= far & (queries[None, :] // SEGMENT == own_segment[:, None])
            visible &= (key[:, None] <= at[None, :]) & (key < count)[:, None]
            lines = (row * tokens + queries) * heads + head
            dkey, dvalue = add_queries(
                key_tile, value_tile, key, heads_q, heads_out, lines, queries, visible, log_sum, shift, place, dtop,
                dkey, dvalue, scaling, cap, q_stride, out_stride, tokens, dims, columns, K, V, HAS_CAP, HAS_TOP,
                PRECISION,
            )  # fmt: skip
    if HAS_LATER:  # noqa: SIM102 - known when compiling, the other is not
        if holds:
            for segment in range(tl.maximum(begin - prefix, 0) // SEGMENT + 1, segments):
                lead = tl.load(pin + row * pin_stride + segment * SEGMENT)
                pinned = (key >= lead) & (key < lead + PINS) & (own_segment < segment)
                line = ((row * segments + segment) * kv_heads + kv_head) * PINS
                at_k = (line + key - lead)[:, None] * K + dims[None, :]
                at_v = (line + key - lead)[:, None] * V + columns[None, :]
                dkey += tl.load(later_k + at_k, mask=pinned[:, None] & (dims < K)[None, :], other=0.0)
                dvalue += tl.load(later_v + at_v, mask=pinned[:, None] & (columns < V)[None, :], other=0.0)
    inside = (key < count)[:, None]
    lines = (row * count + key) * kv_heads + kv_head
    tl.store(
        dk + lines[:, None] * K + dims[None, :], (dkey * scaling).to(dk.dtype.element_ty),
        mask=inside & (dims < K)[None, :],
    )  # fmt: skip
    tl.store(
        dv + lines[:, None] * V + columns[None, :], dvalue.to(dv.dtype.element_ty),
        mask=inside & (columns < V)[None, :],
    )  # fmt: skip


@triton.jit
def segment_kernel(
    q, k, v, first, pin, log_sum, place, shift, dout, dtop, later_k, later_v,
    tokens, prefix, window, first_stride, pin_stride, scaling, cap, segments,
    heads: tl.constexpr, kv_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PINS: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment's queries add to the keys pinned before it, [B, segments, N, PINS, K and V] float32, unscaled.

    Only one document reaches into a segment from before it: that of its first query. What a key's own segment adds,
    `key_kernel` has.
    """
    tiles: tl.constexpr = (PINS + N - 1) // N
    part = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    segment = rest % segments
    kv_head = (rest // segments) % kv_heads
    row = (rest // segments // kv_heads).to(tl.int64)
    group: tl.constexpr = heads // kv_heads
    count = prefix + tokens
    order = part * N + tl.arange(0, N)
    lead = tl.load(pin + row * pin_stride + segment * SEGMENT)
    key = lead + order
    own_segment = tl.maximum(key - prefix, 0) // SEGMENT
    wanted = (order < PINS) & (key < count) & (own_segment < segment)
    dims, columns, tile = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, M)
    k_stride: tl.constexpr = kv_heads * K
    v_stride: tl.constexpr = kv_heads * V
    q_stride: tl.constexpr = heads * K
    out_stride: tl.constexpr = heads * V
    key_tile = load_tile(k + row * count * k_stride + kv_head * K, key, dims, k_stride, count, K)
    value_tile = load_tile(v + row * count * v_stride + kv_head * V, key, columns, v_stride, count, V)
    dkey = tl.zeros([N, KP], tl.float32)
    dvalue = tl.zeros([N, VP], tl.float32)
    begin = segment * SEGMENT
    end = tl.minimum(tokens, begin + SEGMENT)
    end = tl.where(tl.max(wanted.to(tl.int32), 0) > 0, end, begin)
    for member in range(group):
        head = kv_head * group + member
        heads_q = q + row * tokens * q_stride + head * K
        heads_out = dout + row * tokens * out_stride + head * V
        for start in range(begin, end, M):
            queries = start + tile
            at = prefix + queries
            low = run_starts(first, row, first_stride, at, queries, tokens, window, HAS_FIRST)
            pinned = tl.load(pin + row * pin_stride + queries, mask=queries < tokens, other=FAR)
            # what a query sees through its window too is left to `key_kernel`
            visible = wanted[:, None] & (pinned == lead)[None, :] & (key[:, None] < low[None, :])
            lines = (row * tokens + queries) * heads + head
            dkey, dvalue = add_queries(
                key_tile, value_tile, key, heads_q, heads_out, lines, queries, visible, log_sum, shift, place, dtop,
                dkey, dvalue, scaling, cap, q_stride, out_stride, tokens, dims, columns, K, V, HAS_CAP, HAS_TOP,
                PRECISION,
            )  # fmt: skip
    lines = ((row * segments + segment) * kv_heads + kv_head) * PINS + order
    tl.store(
        later_k + lines[:, None] * K + dims[None, :], dkey, mask=(order < PINS)[:, None] & (dims < K)[None, :]
    )
    tl.store(
        later_v + lines[:, None] * V + columns[None, :],
        dvalue,
        mask=(order < PINS)[:, None] & (columns < V)[None, :],
    )
