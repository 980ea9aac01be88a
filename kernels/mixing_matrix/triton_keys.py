"""A block of keys against all queries that see it: the gradient of its features, and of its totals."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.mixing_matrix.triton_common import (
    decayed,
    of_rows,
    product_gradient,
    sees,
    spread,
    teacher_tile,
    totals,
)
from linearize.kernels.window.triton_common import load_tile


@triton.jit
def key_kernel(
    q, k, a, b, high, low, codes, last, log_sum, rest, pull, slope, db, dtotal,
    tokens, window, scaling, cap,
    heads: tl.constexpr, kv_heads: tl.constexpr, map_heads: tl.constexpr, K: tl.constexpr, F: tl.constexpr,
    KP: tl.constexpr, FP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_CODES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DECAY: tl.constexpr, NORMALIZED: tl.constexpr,
    SQUARES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Summed over the query heads of each feature head. Grid (batch * feature heads * blocks of N keys)."""
    blocks = tl.cdiv(tokens, N)
    # keys with many queries first
    block = tl.program_id(0) % blocks
    map_head = (tl.program_id(0) // blocks) % map_heads
    text = (tl.program_id(0) // blocks // map_heads).to(tl.int64)
    key = block * N + tl.arange(0, N)
    dims, columns, tile = tl.arange(0, KP), tl.arange(0, FP), tl.arange(0, M)
    feature = load_tile(
        b + text * tokens * map_heads * F + map_head * F, key, columns, map_heads * F, tokens, F
    )
    inside = key < tokens
    places = text * tokens * map_heads + map_head
    key_high, key_low = totals(high, low, places + key * map_heads, inside, N, HAS_DECAY)
    end = tokens
    if HAS_CODES:
        codes += text * tokens
        end = tl.load(last + text * tokens + tl.minimum(block * N + N, tokens) - 1) + 1
    begin = block * N // M * M
    found, of_total = tl.zeros([N, FP], tl.float32), tl.zeros([N], tl.float32)
    for member in range(heads // map_heads):
        head = map_head * (heads // map_heads) + member
        keys = k + text * tokens * kv_heads * K + head // (heads // kv_heads) * K
        held = load_tile(keys, key, dims, kv_heads * K, tokens, K)
        asking = q + text * tokens * heads * K + head * K
        asked_by = a + text * tokens * heads * F + head * F
        for start in range(begin, end, M):
            queries = start + tile
            real = queries < tokens
            lines = (text * tokens + queries) * heads + head
            code = queries
            if HAS_CODES:
                code = tl.load(codes + queries, mask=real, other=-2)
            seen = sees(queries, key, code, codes, tokens, HAS_CODES)
            query = load_tile(asking, queries, dims, heads * K, tokens, K)
            asked = load_tile(asked_by, queries, columns, heads * F, tokens, F)
            score = teacher_tile(
                query, held, queries, key, seen, window, scaling, cap, HAS_WINDOW, HAS_CAP, PRECISION
            )
            product = tl.dot(asked, tl.trans(feature), input_precision=PRECISION)
            at_high, at_low = totals(high, low, places + queries * map_heads, real, M, HAS_DECAY)
            product, fade = decayed(product, at_high, at_low, key_high, key_low, seen, HAS_DECAY)
            own_sum, own_rest, own_pull, own_slope = of_rows(
                log_sum, rest, pull, slope, lines, real, NORMALIZED
            )
            gradient = product_gradient(
                score, product, seen, own_sum, own_rest, own_pull, own_slope, NORMALIZED, SQUARES
            )
            if HAS_DECAY:
                of_total += tl.sum(gradient * product, 0)
                gradient *= fade
            found = spread(tl.trans(gradient), asked, found, PRECISION)
    tl.store(
        db + (places + key * map_heads)[:, None] * F + columns[None, :], found.to(db.dtype.element_ty),
        mask=inside[:, None] & (columns < F)[None, :],
    )  # fmt: skip
    if HAS_DECAY:
        tl.store(dtotal + places + key * map_heads, of_total, mask=inside)
