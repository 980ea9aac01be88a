"""Outputs and gradients of a chunk with a decay of every key dimension; `triton_levels` says how pairs are made."""

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
    count_halvings,
    halvings,
    in_base_two,
    in_order,
    level_pairs,
    row_exponents,
    row_sums,
    strongest,
)


@triton.jit
def add_products(
    a, b, c, g, docs, stored, out, denominators,
    chunk, batch, head, block, tokens, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr,
    CAUSAL: tl.constexpr, HALVED: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
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


@triton.jit
def add_sums(
    q, k, v, g, docs, do, weight, past, future, dq, dk, dg,
    chunk, batch, head, block, tokens, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    HALVED: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOCS: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK columns of dq, dk and the gradient of log decays, of one chunk and head of the state.

    A decay's gradient is all that passes over it: what readers in the chunk take from it on, less what is read of keys
    from it on, and of the chunk's whole what passes to readers beyond, from its keys and from the state before it.
    """
    group: tl.constexpr = heads // state_heads
    line = batch * state_heads + head
    rows, dims = tl.arange(0, C), block * BK + tl.arange(0, BK)
    BV: tl.constexpr = 64 if V > 64 else V
    first = chunk * C
    segment = chunk // per_segment
    place = first + rows
    inside = place < tokens
    shift: tl.constexpr = 1 if READ_BEFORE else 0
    g += (batch * tokens * state_heads + head) * K
    k += (batch * tokens * state_heads + head) * K
    v += (batch * tokens * state_heads + head) * V
    decays = in_base_two(load_rows(g, first, rows, state_heads * K, dims, tokens))
    whole = tl.sum(decays, 0)
    if HALVED:
        token, half = strongest(decays, rows, C)
        levels = count_halvings(token, half)
        high, low = in_halves(decays)
    else:
        # reader and key factors of the one block, whose middle is reached from either end by `early` and `late`
        passed, early = row_exponents(decays, rows, C)
        late = whole - early
        down = tl.exp2(-passed)
        up = tl.exp2(passed - decays if READ_BEFORE else passed)
    kept = 1.0
    owner = tl.zeros([C], tl.int32)
    if HAS_DOCS:
        owner = load_document(docs, batch, place, tokens)
        before = load_document(docs, batch, first - 1, tokens)
        after = load_document(docs, batch, first + C - 1, tokens)
        same = owner[:, None] == load_document(docs, batch, first + rows, tokens)[None, :]
        kept = tl.where(before == after, 1.0, 0.0)
    norm = tl.zeros([BK], tl.float32)
    if NORMALIZE:
        norm = load_norm(past, line, chunk, periods, segment, segments, dims, K, 2, HAS_CARRY, False)
    # the queries' side, one head after the other; `readers` is what their products q.dq come to
    readers = tl.zeros([C, BK], tl.float32)
    for member in range(group):
        own = head * group + member
        lines = (batch * tokens + place) * heads + own
        outgoing = do + (batch * tokens * heads + own) * V
        for_q = tl.zeros([C, BK], tl.float32)
        scores = tl.zeros([C, C], tl.float32)
        for part in range(V // BV):
            values = part * BV + tl.arange(0, BV)
            square = dims[None, :] * V + values[:, None]
            x = load_rows(outgoing, first, rows, heads * V, values, tokens)
            ahead = load_state(
                past, line, chunk, periods, segment, segments, square, dims, K, V, 2, HAS_CARRY, False, True
            )
            for_q = tl.dot(x.to(ahead.dtype), ahead, for_q, input_precision=PRECISION)
            turned = load_columns(v, first, rows, state_heads * V, values, tokens)
            scores = tl.dot(x, turned, scores, input_precision=PRECISION)
        if NORMALIZE:
            bias = tl.load(weight + lines, mask=inside, other=0.0)
            for_q += bias[:, None] * norm[None, :]
            scores += bias[:, None]
        if HALVED:
            for_q *= tl.exp2(row_sums(high, low, rows, tl.zeros([C], tl.int32), rows - shift))
        else:
            for_q *= tl.exp2(early)[None, :]
        if HAS_DOCS:
            for_q = tl.where((owner == before)[:, None], for_q, 0.0)
            scores = tl.where(same, scores, 0.0)
        if HALVED:
            for level in range(0, levels + 1):
                lanes = rows + (level >> 3)
                pairs, middle = level_pairs(lanes, 6 - level, level == levels, True, READ_BEFORE)
                keys = load_rows(k, first, lanes, state_heads * K, dims, tokens)
                down = tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP)
                right = keys.to(tl.float32) * tl.exp2(down)
                up = tl.exp2(tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP))
                left = tl.where(pairs, scores, 0.0)
                if WIDE:
                    for_q += up * tl.dot(left, right, input_precision=PRECISION)
                else:
                    for_q += up * tl.dot(left.to(keys.dtype), right.to(keys.dtype))
        else:
            keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
            right = keys.to(tl.float32) * down
            scores = tl.where(in_order(rows, True, READ_BEFORE), scores, 0.0)
            if WIDE:
                for_q = tl.dot(scores, right, for_q, input_precision=PRECISION)
            else:
                for_q = tl.dot(scores.to(keys.dtype), right.to(keys.dtype), for_q)
            for_q *= up
        tl.store(dq + lines[:, None] * K + dims[None, :], for_q.to(dq.dtype.element_ty), mask=inside[:, None])
        queries = load_rows(q + (batch * tokens * heads + own) * K, first, rows, heads * K, dims, tokens)
        readers += queries.to(tl.float32) * for_q
    # the keys' side
    through = tl.zeros([BK], tl.float32)
    for_k = tl.zeros([C, BK], tl.float32)
    for part in range(V // BV):
        values = part * BV + tl.arange(0, BV)
        square = dims[None, :] * V + values[:, None]
        behind = load_state(
            future, line, chunk, periods, segment, segments, square, dims, K, V, 2, HAS_CARRY, True, True
        )
        ahead = load_state(
            past, line, chunk, periods, segment, segments, square, dims, K, V, 2, HAS_CARRY, False, True
        )
        through += tl.sum(behind.to(tl.float32) * ahead.to(tl.float32), 0)
        x = load_rows(v, first, rows, state_heads * V, values, tokens)
        for_k = tl.dot(x.to(behind.dtype), behind, for_k, input_precision=PRECISION)
    if NORMALIZE:
        behind_norm = load_norm(future, line, chunk, periods, segment, segments, dims, K, 2, HAS_CARRY, True)
        for_k += behind_norm[None, :]
        through += norm * behind_norm
    if HALVED:
        for_k *= tl.exp2(-row_sums(high, low, rows, tl.zeros([C], tl.int32) + C, rows))
    else:
        for_k *= tl.exp2(late)[None, :]
    if HAS_DOCS:
        for_k = tl.where((owner == after)[:, None], for_k, 0.0)
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens).to(tl.float32)
    through = through * tl.exp2(whole) * kept + tl.sum((keys if HALVED else keys * down) * for_k, 0)
    for member in range(group):
        own = head * group + member
        outgoing = do + (batch * tokens * heads + own) * V
        scores = tl.zeros([C, C], tl.float32)
        for part in range(V // BV):
            values = part * BV + tl.arange(0, BV)
            x = load_rows(v, first, rows, state_heads * V, values, tokens)
            turned = load_columns(outgoing, first, rows, heads * V, values, tokens)
            scores = tl.dot(x, turned, scores, input_precision=PRECISION)
        if NORMALIZE:
            at = (batch * tokens + first + rows) * heads + own
            scores += tl.load(weight + at, mask=first + rows < tokens, other=0.0)[None, :]
        if HAS_DOCS:
            scores = tl.where(same, scores, 0.0)
        if HALVED:
            for level in range(0, levels + 1):
                lanes = rows + (level >> 3)
                pairs, middle = level_pairs(lanes, 6 - level, level == levels, False, READ_BEFORE)
                queries = load_rows(
                    q + (batch * tokens * heads + own) * K, first, lanes, heads * K, dims, tokens
                )
                up = tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP)
                right = queries.to(tl.float32) * tl.exp2(up)
                down = tl.exp2(tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP))
                left = tl.where(pairs, scores, 0.0)
                if WIDE:
                    for_k += down * tl.dot(left, right, input_precision=PRECISION)
                else:
                    for_k += down * tl.dot(left.to(queries.dtype), right.to(queries.dtype))
        else:
            queries = load_rows(q + (batch * tokens * heads + own) * K, first, rows, heads * K, dims, tokens)
            right = queries.to(tl.float32) * up
            scores = tl.where(in_order(rows, False, READ_BEFORE), scores, 0.0)
            if WIDE:
                for_k = tl.dot(scores, right, for_k, input_precision=PRECISION)
            else:
                for_k = tl.dot(scores.to(queries.dtype), right.to(queries.dtype), for_k)
    if not HALVED:
        for_k *= down
    lines = (batch * tokens + place) * state_heads + head
    to = lines[:, None] * K + dims[None, :]
    tl.store(dk + to, for_k.to(dk.dtype.element_ty), mask=inside[:, None])
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
    found = tl.cumsum(readers - keys.to(tl.float32) * for_k, 0, reverse=True) + through[None, :]
    if READ_BEFORE:
        found -= readers
    tl.store(dg + to, found.to(dg.dtype.element_ty), mask=inside[:, None])
