"""Weighted sums of a chunk with a decay of every key dimension: outputs, and gradients of values.

`triton_levels` says how pairs are made.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_linear.triton_common import (
    in_halves,
    load_columns,
    load_document,
    load_norm,
    load_rows,
    load_state,
)
from linearize.kernels.gated_linear.triton_levels import (
    CAP,
    column_exponents,
    column_sums,
    halvings,
    in_base_two,
    in_order,
    level_pairs,
    row_exponents,
    row_sums,
)


@triton.jit
def add_products(
    a, b, c, g, bonus, docs, stored, out, denominators,
    chunk, batch, head, block, tokens, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr,
    CAUSAL: tl.constexpr, HALVED: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_BONUS: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of o (CAUSAL: a, b, c are q, k, v) or of dv (k, q, do): BV of its columns."""
    group: tl.constexpr = heads // state_heads
    state_head = head // group if CAUSAL else head
    own_heads: tl.constexpr = heads if CAUSAL else state_heads
    other_heads: tl.constexpr = state_heads if CAUSAL else heads
    line = batch * state_heads + state_head
    rows, values = tl.arange(0, C), block * BV + tl.arange(0, BV)
    first = chunk * C
    segment = chunk // per_segment
    place = first + rows
    inside = place < tokens
    lines = (batch * tokens + place) * own_heads + head
    a += (batch * tokens * own_heads + head) * K
    g += (batch * tokens * state_heads + state_head) * K
    # the last decay that a row has met: readers their own, or the one before it; keys their own
    shift: tl.constexpr = 1 if READ_BEFORE else 0
    own_shift: tl.constexpr = shift if CAUSAL else 0
    other_shift: tl.constexpr = 0 if CAUSAL else shift
    sign: tl.constexpr = 1.0 if CAUSAL else -1.0
    reach = tl.where(inside, 1.0, 0.0)
    if HAS_DOCS:
        owner = load_document(docs, batch, place, tokens)
        boundary = load_document(docs, batch, first - 1 if CAUSAL else first + C - 1, tokens)
        reach = tl.where(owner == boundary, reach, 0.0)
    if HALVED:
        levels = halvings(g, first, rows, tokens, state_heads, K, BK, C)
    result = tl.zeros([C, BV], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    for member in range(1 if CAUSAL else group):
        other_head = state_head if CAUSAL else head * group + member
        left = b + (batch * tokens * other_heads + other_head) * K
        scores = tl.zeros([C, C], tl.float32)
        if HALVED:
            for level in range(0, levels + 1):
                # always `rows`, but the compiler does not know it: nothing of a level may wait for it in registers
                lanes = rows + (level >> 3)
                pairs, middle = level_pairs(lanes, 6 - level, level == levels, CAUSAL, READ_BEFORE)
                found = tl.zeros([C, C], tl.float32)
                for part in range(K // BK):
                    dims = part * BK + tl.arange(0, BK)
                    high, low = in_halves(
                        in_base_two(load_rows(g, first, lanes, state_heads * K, dims, tokens))
                    )
                    factor = tl.exp2(
                        tl.minimum(row_sums(high, low, lanes, middle, lanes - own_shift) * sign, CAP)
                    )
                    x = load_rows(a, first, lanes, own_heads * K, dims, tokens)
                    own = x.to(tl.float32) * factor
                    tl.debug_barrier()  # the other tile is not loaded before there are registers for it
                    high, low = in_halves(
                        in_base_two(load_columns(g, first, lanes, state_heads * K, dims, tokens))
                    )
                    factor = tl.exp2(
                        tl.minimum(column_sums(high, low, lanes, middle, lanes - other_shift) * -sign, CAP)
                    )
                    y = load_columns(left, first, lanes, other_heads * K, dims, tokens)
                    other = y.to(tl.float32) * factor
                    if WIDE:
                        found = tl.dot(own, other, found, input_precision=PRECISION)
                    else:
                        found = tl.dot(own.to(x.dtype), other.to(x.dtype), found, input_precision=PRECISION)
                scores = tl.where(pairs, found, scores)
                tl.debug_barrier()  # nor the next level's
        else:
            for part in range(K // BK):
                dims = part * BK + tl.arange(0, BK)
                decays = in_base_two(load_rows(g, first, rows, state_heads * K, dims, tokens))
                passed, _ = row_exponents(decays, rows, C)
                if READ_BEFORE and CAUSAL:
                    passed -= decays
                x = load_rows(a, first, rows, own_heads * K, dims, tokens)
                own = x.to(tl.float32) * tl.exp2(passed * sign)
                decays = in_base_two(load_columns(g, first, rows, state_heads * K, dims, tokens))
                passed = column_exponents(decays, rows, C)
                if READ_BEFORE and not CAUSAL:
                    passed -= decays
                y = load_columns(left, first, rows, other_heads * K, dims, tokens)
                other = y.to(tl.float32) * tl.exp2(passed * -sign)
                if WIDE:
                    scores = tl.dot(own, other, scores, input_precision=PRECISION)
                else:
                    scores = tl.dot(own.to(x.dtype), other.to(x.dtype), scores)
            scores = tl.where(in_order(rows, CAUSAL, READ_BEFORE), scores, 0.0)
        if HAS_DOCS:
            scores = tl.where(
                owner[:, None] == load_document(docs, batch, first + rows, tokens)[None, :], scores, 0.0
            )
        if NORMALIZE and CAUSAL:
            denominator += tl.sum(scores, 1)
        right = c + (batch * tokens * other_heads + other_head) * V
        z = load_rows(right, first, rows, other_heads * V, values, tokens)
        if WIDE:
            result = tl.dot(scores, z.to(tl.float32), result, input_precision=PRECISION)
        else:
            result = tl.dot(scores.to(z.dtype), z, result, input_precision=PRECISION)
        if HAS_BONUS:
            # not on the diagonal of the scores: there it would be rounded with them
            own_weight = tl.zeros([C], tl.float32)
            for part in range(K // BK):
                dims = part * BK + tl.arange(0, BK)
                x = load_rows(a, first, rows, own_heads * K, dims, tokens).to(tl.float32)
                y = load_rows(left, first, rows, other_heads * K, dims, tokens).to(tl.float32)
                factor = tl.load(bonus + state_head * K + dims).to(tl.float32)
                own_weight += tl.sum(x * y * factor[None, :], 1)
            result += own_weight[:, None] * z.to(tl.float32)
            if NORMALIZE and CAUSAL:
                denominator += own_weight
    for part in range(K // BK):
        dims = part * BK + tl.arange(0, BK)
        decays = in_base_two(load_rows(g, first, rows, state_heads * K, dims, tokens))
        if HALVED:
            high, low = in_halves(decays)
            end = tl.zeros([C], tl.int32) + (0 if CAUSAL else C)
            outside = row_sums(high, low, rows, end, rows - own_shift) * sign
        else:
            passed, early = row_exponents(decays, rows, C)
            if READ_BEFORE and CAUSAL:
                passed -= decays
            edge = early if CAUSAL else tl.sum(decays, 0) - early
            outside = passed * sign + edge[None, :]
        x = load_rows(a, first, rows, own_heads * K, dims, tokens)
        read = x.to(tl.float32) * tl.exp2(outside) * reach[:, None]
        square = dims[:, None] * V + values[None, :]
        state = load_state(
            stored,
            line,
            chunk,
            periods,
            segment,
            segments,
            square,
            dims,
            K,
            V,
            2,
            HAS_CARRY,
            not CAUSAL,
            False,
        )
        result = tl.dot(read.to(state.dtype), state, result, input_precision=PRECISION)
        if NORMALIZE and CAUSAL:
            norm = load_norm(stored, line, chunk, periods, segment, segments, dims, K, 2, HAS_CARRY, False)
            denominator += tl.sum(read * norm[None, :], 1)
    tl.store(
        out + lines[:, None] * V + values[None, :], result.to(out.dtype.element_ty), mask=inside[:, None]
    )
    if NORMALIZE and CAUSAL:  # noqa: SIM102
        if block == 0:
            tl.store(denominators + lines, denominator, mask=inside)
