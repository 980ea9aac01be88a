"""Sums of keys and of queries in a chunk with a decay of every key dimension: what the gradients of both are.

dq_t = sum over j <= t of (do_t.v_j) exp(G_t - G_j) k_j is also the output of the form whose values decay, with other
names: queries in the place of do, keys in that of v, values in that of k. So `sum_keys` serves both.
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
    count_halvings,
    in_base_two,
    in_order,
    level_pairs,
    row_exponents,
    row_sums,
    strongest,
    under_decay,
)


@triton.jit
def factors(decays, rows, C: tl.constexpr, HALVED: tl.constexpr, READ_BEFORE: tl.constexpr):
    """How often to halve and the decays in two parts; or, of a chunk that is not halved, factors about its middle.

    The latter: decays from the start to the middle and from there to the end, factors of keys and of readers.
    """
    levels = 0
    high, low = in_halves(decays)
    early, late, down, up = 0.0, 0.0, 0.0, 0.0
    if HALVED:
        token, half = strongest(decays, rows, C)
        levels = count_halvings(token, half)
    else:
        passed, early = row_exponents(decays, rows, C)
        late = tl.sum(decays, 0) - early
        down = tl.exp2(-passed)
        up = tl.exp2(passed - decays if READ_BEFORE else passed)
    return levels, high, low, early, late, down, up


@triton.jit
def sum_keys(
    outgoing, meeting, k, v, bias, norm, past, factors_of_chunk, owner, others, before,
    line, chunk, first, rows, dims, tokens, periods, segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, HALVED: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr, PASSING: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one head's readers `outgoing` [T, V]: the decayed keys `dims` weighted by their products with v, [C, BK].

    And if PASSING their products with `meeting` [T, K], which pass over the decays; `under_decay` says with which.
    """
    BV: tl.constexpr = 64 if V > 64 else V
    shift: tl.constexpr = 1 if READ_BEFORE else 0
    levels, high, low, early, _, down, up = factors_of_chunk
    result = tl.zeros([C, BK], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    for part in range(V // BV):
        values = part * BV + tl.arange(0, BV)
        square = dims[None, :] * V + values[:, None]
        x = load_rows(outgoing, first, rows, heads * V, values, tokens)
        ahead = load_state(
            past, line, chunk, periods, segment, segments, square, dims, K, V, 2, HAS_CARRY, False, True
        )
        result = tl.dot(x.to(ahead.dtype), ahead, result, input_precision=PRECISION)
        turned = load_columns(v, first, rows, state_heads * V, values, tokens)
        scores = tl.dot(x, turned, scores, input_precision=PRECISION)
    if NORMALIZE:
        result += bias[:, None] * norm[None, :]
        scores += bias[:, None]
    if HALVED:
        result *= tl.exp2(row_sums(high, low, rows, tl.zeros([C], tl.int32), rows - shift))
    else:
        result *= tl.exp2(early)[None, :]
    if HAS_DOCS:
        result = tl.where((owner == before)[:, None], result, 0.0)
        scores = tl.where(owner[:, None] == others[None, :], scores, 0.0)
    passing = result
    if HALVED:
        if PASSING:
            passing = result * load_rows(meeting, first, rows, heads * K, dims, tokens).to(tl.float32)
        for level in range(0, levels + 1):
            lanes = rows + (level >> 3)
            pairs, middle = level_pairs(lanes, 6 - level, level == levels, True, READ_BEFORE)
            keys = load_rows(k, first, lanes, state_heads * K, dims, tokens)
            below = tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP)
            right = under_decay(keys, tl.exp2(below), WIDE, PRECISION)
            above = tl.exp2(tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP))
            left = tl.where(pairs, scores, 0.0)
            given = tl.dot(left.to(right.dtype), right, input_precision=PRECISION)
            result += above * given
            if PASSING:
                own = under_decay(
                    load_rows(meeting, first, lanes, heads * K, dims, tokens), above, WIDE, PRECISION
                )
                passing += given * own.to(tl.float32)
    else:
        keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
        right = under_decay(keys, down, WIDE, PRECISION)
        scores = tl.where(in_order(rows, True, READ_BEFORE), scores, 0.0)
        result = tl.dot(scores.to(right.dtype), right, result, input_precision=PRECISION)
        if PASSING:
            own = under_decay(load_rows(meeting, first, rows, heads * K, dims, tokens), up, WIDE, PRECISION)
            passing = result * own.to(tl.float32)
        result *= up
    return result, passing


@triton.jit
def own_products(
    outgoing, v, bias, first, rows, tokens,
    heads: tl.constexpr, state_heads: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Each reader's product with the value of its own token, which a bonus weighs; made again rather than kept."""
    BV: tl.constexpr = 64 if V > 64 else V
    result = bias
    for part in range(V // BV):
        values = part * BV + tl.arange(0, BV)
        x = load_rows(outgoing, first, rows, heads * V, values, tokens).to(tl.float32)
        result += tl.sum(x * load_rows(v, first, rows, state_heads * V, values, tokens).to(tl.float32), 1)
    return result


@triton.jit
def add_sums(
    q, k, v, g, bonus, docs, do, weight, past, future, dq, dk, dg, dbonus,
    chunk, batch, head, block, tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    HALVED: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BONUS: tl.constexpr,
    WITH_Q: tl.constexpr, COMPLEMENT: tl.constexpr, ADD: tl.constexpr, HAS_DOCS: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK columns of dq, dk and the gradient of log decays, of one chunk and head of the state.

    A decay's gradient is all that passes over it: what readers in the chunk take from it on, less what is read of keys
    from it on, and of the chunk's whole what passes to readers beyond, from its keys and from the state before it.

    WITH_Q: store dq. COMPLEMENT: keys are 1 - exp(g), so that their gradient becomes one of g. ADD: to what dg holds.
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
    made = factors(decays, rows, C, HALVED, READ_BEFORE)
    levels, high, low, _, late, down, up = made
    kept = 1.0
    owner = tl.zeros([C], tl.int32)
    others, before = owner, 0
    if HAS_DOCS:
        owner = load_document(docs, batch, place, tokens)
        before = load_document(docs, batch, first - 1, tokens)
        after = load_document(docs, batch, first + C - 1, tokens)
        others = load_document(docs, batch, first + rows, tokens)
        same = owner[:, None] == others[None, :]
        kept = tl.where(before == after, 1.0, 0.0)
    norm = tl.zeros([BK], tl.float32)
    if NORMALIZE:
        norm = load_norm(past, line, chunk, periods, segment, segments, dims, K, 2, HAS_CARRY, False)
    # the queries' side, one head after the other; `readers` is what their products q.dq come to
    readers = tl.zeros([C, BK], tl.float32)
    for member in range(group):
        own = head * group + member
        lines = (batch * tokens + place) * heads + own
        bias = tl.zeros([C], tl.float32)
        if NORMALIZE:
            bias = tl.load(weight + lines, mask=inside, other=0.0)
        outgoing = do + (batch * tokens * heads + own) * V
        meeting = q + (batch * tokens * heads + own) * K
        for_q, passing = sum_keys(
            outgoing, meeting, k, v, bias, norm, past, made, owner, others, before,
            line, chunk, first, rows, dims, tokens, periods, segment, segments,
            heads, state_heads, K, V, BK, C, HALVED, READ_BEFORE, NORMALIZE, HAS_DOCS, HAS_CARRY, True, WIDE,
            PRECISION,
        )  # fmt: skip
        readers += passing
        if HAS_BONUS:
            own_weight = own_products(outgoing, v, bias, first, rows, tokens, heads, state_heads, V)
            factor = tl.load(bonus + head * K + dims).to(tl.float32)
            keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
            for_q += own_weight[:, None] * factor[None, :] * keys.to(tl.float32)
        if WITH_Q:
            tl.store(
                dq + lines[:, None] * K + dims[None, :], for_q.to(dq.dtype.element_ty), mask=inside[:, None]
            )
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
    through *= tl.exp2(whole) * kept
    moved = readers
    if HALVED:
        over = for_k * load_rows(k, first, rows, state_heads * K, dims, tokens).to(tl.float32)
        through += tl.sum(over, 0)
        moved -= over
    else:
        written = load_rows(k, first, rows, state_heads * K, dims, tokens)
        through += tl.sum(for_k * under_decay(written, down, WIDE, PRECISION).to(tl.float32), 0)
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
                above = tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP)
                right = under_decay(queries, tl.exp2(above), WIDE, PRECISION)
                below = tl.exp2(tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP))
                left = tl.where(pairs, scores, 0.0)
                given = tl.dot(left.to(right.dtype), right, input_precision=PRECISION)
                for_k += below * given
                written = load_rows(k, first, lanes, state_heads * K, dims, tokens)
                moved -= given * under_decay(written, below, WIDE, PRECISION).to(tl.float32)
        else:
            queries = load_rows(q + (batch * tokens * heads + own) * K, first, rows, heads * K, dims, tokens)
            right = under_decay(queries, up, WIDE, PRECISION)
            scores = tl.where(in_order(rows, False, READ_BEFORE), scores, 0.0)
            for_k = tl.dot(scores.to(right.dtype), right, for_k, input_precision=PRECISION)
    if not HALVED:
        written = load_rows(k, first, rows, state_heads * K, dims, tokens)
        moved -= for_k * under_decay(written, down, WIDE, PRECISION).to(tl.float32)
        for_k *= down
    lines = (batch * tokens + place) * state_heads + head
    to = lines[:, None] * K + dims[None, :]
    found = tl.cumsum(moved, 0, reverse=True) + through[None, :]
    if READ_BEFORE:
        found -= readers
    if HAS_BONUS:
        own_keys = tl.zeros([C, BK], tl.float32)
        for member in range(group):
            own = head * group + member
            bias = tl.zeros([C], tl.float32)
            if NORMALIZE:
                bias = tl.load(weight + (batch * tokens + place) * heads + own, mask=inside, other=0.0)
            outgoing = do + (batch * tokens * heads + own) * V
            own_weight = own_products(outgoing, v, bias, first, rows, tokens, heads, state_heads, V)
            queries = load_rows(q + (batch * tokens * heads + own) * K, first, rows, heads * K, dims, tokens)
            own_keys += own_weight[:, None] * queries.to(tl.float32)
        for_k += own_keys * tl.load(bonus + head * K + dims).to(tl.float32)[None, :]
        keys = load_rows(k, first, rows, state_heads * K, dims, tokens).to(tl.float32)
        tl.store(dbonus + (line * tiles + chunk) * K + dims, tl.sum(keys * own_keys, 0))
    if COMPLEMENT:
        found -= tl.exp2(decays) * for_k
    else:
        tl.store(dk + to, for_k.to(dk.dtype.element_ty), mask=inside[:, None])
    if ADD:
        found += tl.load(dg + to, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(dg + to, found.to(dg.dtype.element_ty), mask=inside[:, None])
