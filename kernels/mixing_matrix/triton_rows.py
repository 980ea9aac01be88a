"""A block of query rows against all keys that it sees: what the rows differ by, and the gradient of its features."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.mixing_matrix.triton_common import (
    LOG2E,
    SMALLEST,
    decayed,
    inverse,
    of_rows,
    product_gradient,
    pulled,
    sees,
    spread,
    teacher_tile,
    totals,
)
from linearize.kernels.window.triton_common import load_tile


@triton.jit
def placed(
    tokens, first, heads: tl.constexpr, map_heads: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_CODES: tl.constexpr,
):  # fmt: skip
    """The block of M rows that a program has, of a grid (batch * heads * blocks), and which keys it sees.

    Returns:
        queries [M] and which are there [M], the head, the text, where its first feature's row stands among those of
        all texts and feature heads, and the first key and the one behind the last, from the start of a tile of N on.
    """
    blocks = tl.cdiv(tokens, M)
    # long rows first
    block = blocks - 1 - tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % heads
    text = (tl.program_id(0) // blocks // heads).to(tl.int64)
    queries = block * M + tl.arange(0, M)
    place = text * tokens * map_heads + head // (heads // map_heads)
    begin = 0
    if HAS_CODES:
        begin = tl.load(first + text * tokens + block * M) // N * N
    return queries, queries < tokens, head, text, place, begin, tl.minimum(tokens, block * M + M)


@triton.jit
def row_kernel(
    q, k, a, b, high, low, sink, codes, first, rows_out, log_sum_out, rest_out, pull_out,
    tokens, window, scaling, cap,
    heads: tl.constexpr, kv_heads: tl.constexpr, map_heads: tl.constexpr, K: tl.constexpr, F: tl.constexpr,
    KP: tl.constexpr, FP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_CODES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINK: tl.constexpr, HAS_DECAY: tl.constexpr,
    NORMALIZED: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both sums of every row in a first pass over its keys, what it differs by in a second.

    Grid (batch * heads * blocks of M rows).
    """
    dims, columns, tile = tl.arange(0, KP), tl.arange(0, FP), tl.arange(0, N)
    queries, real, head, text, place, begin, end = placed(tokens, first, heads, map_heads, M, N, HAS_CODES)
    lines = (text * tokens + queries) * heads + head
    keys = k + text * tokens * kv_heads * K + head // (heads // kv_heads) * K
    features = b + place * F
    query = load_tile(q + (text * tokens * heads + head) * K, queries, dims, heads * K, tokens, K)
    asked = load_tile(a + (text * tokens * heads + head) * F, queries, columns, heads * F, tokens, F)
    code = queries
    if HAS_CODES:
        codes += text * tokens
        code = tl.load(codes + queries, mask=real, other=-2)
    at_high, at_low = totals(high, low, place + queries * map_heads, real, M, HAS_DECAY)
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    if HAS_SINK:
        top = tl.zeros([M], tl.float32) + tl.load(sink + head).to(tl.float32)
        total += 1.0
    mass = tl.zeros([M], tl.float32)
    for start in range(begin, end, N):
        key = start + tile
        seen = sees(queries, key, code, codes, tokens, HAS_CODES)
        held = load_tile(keys, key, dims, kv_heads * K, tokens, K)
        score = teacher_tile(
            query, held, queries, key, seen, window, scaling, cap, HAS_WINDOW, HAS_CAP, PRECISION
        )
        highest = tl.maximum(top, tl.max(score, 1))
        level = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2((top - level) * LOG2E) + tl.sum(tl.exp2((score - level[:, None]) * LOG2E), 1)
        top = highest
        if NORMALIZED:
            feature = load_tile(features, key, columns, map_heads * F, tokens, F)
            product = tl.dot(asked, tl.trans(feature), input_precision=PRECISION)
            key_high, key_low = totals(high, low, place + key * map_heads, key < tokens, N, HAS_DECAY)
            product, _ = decayed(product, at_high, at_low, key_high, key_low, seen, HAS_DECAY)
            mass += tl.sum(tl.where(seen, product, 0.0), 1)
    log_sum = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), 0.0)
    rest = inverse(mass)
    differs, pull = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    for start in range(begin, end, N):
        key = start + tile
        seen = sees(queries, key, code, codes, tokens, HAS_CODES)
        held = load_tile(keys, key, dims, kv_heads * K, tokens, K)
        score = teacher_tile(
            query, held, queries, key, seen, window, scaling, cap, HAS_WINDOW, HAS_CAP, PRECISION
        )
        feature = load_tile(features, key, columns, map_heads * F, tokens, F)
        weight = tl.dot(asked, tl.trans(feature), input_precision=PRECISION)
        key_high, key_low = totals(high, low, place + key * map_heads, key < tokens, N, HAS_DECAY)
        weight, _ = decayed(weight, at_high, at_low, key_high, key_low, seen, HAS_DECAY)
        if NORMALIZED:
            weight *= rest[:, None]
        weight = tl.where(seen, weight, 0.0)
        share = tl.exp2((score - log_sum[:, None]) * LOG2E)
        if SQUARES:
            differs += tl.sum((weight - share) * (weight - share), 1)
        else:
            differs -= tl.sum(share * tl.log(tl.maximum(weight, SMALLEST)), 1)
        if NORMALIZED:
            pull -= tl.sum(pulled(share, weight, SQUARES) * weight, 1)
    tl.store(rows_out + lines, differs, mask=real)
    tl.store(log_sum_out + lines, log_sum, mask=real)
    if NORMALIZED:
        tl.store(rest_out + lines, rest, mask=real)
        tl.store(pull_out + lines, pull, mask=real)


@triton.jit
def query_kernel(
    q, k, a, b, high, low, codes, first, log_sum, rest, pull, slope, da, dtotal,
    tokens, window, scaling, cap,
    heads: tl.constexpr, kv_heads: tl.constexpr, map_heads: tl.constexpr, K: tl.constexpr, F: tl.constexpr,
    KP: tl.constexpr, FP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_CODES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DECAY: tl.constexpr, NORMALIZED: tl.constexpr,
    SQUARES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries' features and of their totals. Grid (batch * heads * blocks of M rows)."""
    dims, columns, tile = tl.arange(0, KP), tl.arange(0, FP), tl.arange(0, N)
    queries, real, head, text, place, begin, end = placed(tokens, first, heads, map_heads, M, N, HAS_CODES)
    lines = (text * tokens + queries) * heads + head
    keys = k + text * tokens * kv_heads * K + head // (heads // kv_heads) * K
    features = b + place * F
    query = load_tile(q + (text * tokens * heads + head) * K, queries, dims, heads * K, tokens, K)
    asked = load_tile(a + (text * tokens * heads + head) * F, queries, columns, heads * F, tokens, F)
    code = queries
    if HAS_CODES:
        codes += text * tokens
        code = tl.load(codes + queries, mask=real, other=-2)
    at_high, at_low = totals(high, low, place + queries * map_heads, real, M, HAS_DECAY)
    own_sum, own_rest, own_pull, own_slope = of_rows(log_sum, rest, pull, slope, lines, real, NORMALIZED)
    found, of_total = tl.zeros([M, FP], tl.float32), tl.zeros([M], tl.float32)
    for start in range(begin, end, N):
        key = start + tile
        seen = sees(queries, key, code, codes, tokens, HAS_CODES)
        held = load_tile(keys, key, dims, kv_heads * K, tokens, K)
        score = teacher_tile(
            query, held, queries, key, seen, window, scaling, cap, HAS_WINDOW, HAS_CAP, PRECISION
        )
        feature = load_tile(features, key, columns, map_heads * F, tokens, F)
        product = tl.dot(asked, tl.trans(feature), input_precision=PRECISION)
        key_high, key_low = totals(high, low, place + key * map_heads, key < tokens, N, HAS_DECAY)
        product, fade = decayed(product, at_high, at_low, key_high, key_low, seen, HAS_DECAY)
        gradient = product_gradient(
            score, product, seen, own_sum, own_rest, own_pull, own_slope, NORMALIZED, SQUARES
        )
        if HAS_DECAY:
            of_total += tl.sum(gradient * product, 1)
            gradient *= fade
        found = spread(gradient, feature, found, PRECISION)
    tl.store(
        da + lines[:, None] * F + columns[None, :], found.to(da.dtype.element_ty),
        mask=real[:, None] & (columns < F)[None, :],
    )  # fmt: skip
    if HAS_DECAY:
        tl.store(dtotal + lines, of_total, mask=real)
