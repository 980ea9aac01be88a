"""Outputs and gradients of linear attention without decay or with one decay a head, tile by tile.

o = sum_s W_ts (q_t.k_s) v_s is one of four sums of one form, sum (a.b) W c, over the tiles of a period, and a state:

    o_t  = sum over s <= t of (q_t.k_s)  W_ts v_s   + what q_t reads of the state before the period
    dq_t = sum over s <= t of (do_t.v_s) W_ts k_s   + what do_t reads of it, transposed
    dk_s = sum over t >= s of (v_s.do_t) W_ts q_t   + what v_s reads of the state's gradient behind the period
    dv_s = sum over t >= s of (k_s.q_t)  W_ts do_t  + what k_s reads of it, transposed

so one function serves all. The three gradients of a tile are programs side by side, which read the same q, k, v and do
out of the cache, instead of one that would hold three accumulators in its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_linear.triton_common import (
    coordinates,
    in_two,
    load_columns,
    load_decay,
    load_document,
    load_norm,
    load_rows,
    load_state,
)


@triton.jit
def add_tiles(
    a, b, c, own, g, docs, weight, stored, opposite, out, extra,
    tile, batch, head, block, tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, A: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    CAUSAL: tl.constexpr, TURNED: tl.constexpr, HAS_DECAY: tl.constexpr, READ_BEFORE: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of o or dq (CAUSAL, `head` of the queries) or of dk or dv (`head` of the state).

    A is the width of a and b, WIDTH that of c and of the result, of which BLOCK columns are made here. TURNED states
    are read with rows of V: for dq and dk, whose products a.b are gradients of weights and get the denominators'
    `weight`. `stored` are the states that are read, `opposite`, for dk, those of the other direction, as in
    `load_state`. `extra` are for o the denominators; for dq and dk what the gradient of decays needs: q.dq or k.dk of
    each row; for dk also its part from beyond the period, and what passes through all of it.
    """
    group: tl.constexpr = heads // state_heads
    state_head = head // group if CAUSAL else head
    own_heads: tl.constexpr = heads if CAUSAL else state_heads
    other_heads: tl.constexpr = state_heads if CAUSAL else heads
    line = batch * state_heads + state_head
    rows, dims, columns = tl.arange(0, C), tl.arange(0, A), block * BLOCK + tl.arange(0, BLOCK)
    first = tile * C
    period = tile // TILES
    start = period * TILES * C
    segment = period // per_segment
    place = first + rows
    inside = place < tokens
    lines = (batch * tokens + place) * own_heads + head
    x = load_rows(a + (batch * tokens * own_heads + head) * A, first, rows, own_heads * A, dims, tokens)
    reach = tl.where(inside, 1.0, 0.0)
    kept = 1.0
    if HAS_DECAY:
        g += batch * tokens * state_heads + state_head
        own_sum, own_rest, coarse, fine = coordinates(g, first, rows, start, tokens, state_heads, TILES * C)
        span = tl.arange(0, TILES * C)
        every, every_fine = in_two(load_decay(g, start + span, start + span < tokens, state_heads))
        whole, whole_rest = tl.sum(every, 0), tl.sum(every_fine, 0)
        kept = tl.exp2(whole + whole_rest)
        if CAUSAL:
            if READ_BEFORE:
                own_sum, own_rest = own_sum - coarse, own_rest - fine
            reach = tl.exp2(own_sum + own_rest)
        else:
            reach = tl.exp2((whole - own_sum) + (whole_rest - own_rest))
    if HAS_DOCS:
        owner = load_document(docs, batch, place, tokens)
        before = load_document(docs, batch, start - 1, tokens)
        after = load_document(docs, batch, start + TILES * C - 1, tokens)
        reach = tl.where(owner == (before if CAUSAL else after), reach, 0.0)
        kept = tl.where(before == after, kept, 0.0)
    if TURNED:
        square, features = columns[None, :] * V + dims[:, None], columns
    else:
        square, features = dims[:, None] * V + columns[None, :], dims
    DECAY: tl.constexpr = 1 if HAS_DECAY else 0
    state = load_state(
        stored, line, period, periods, segment, segments, square, features, K, V, DECAY, HAS_CARRY, not CAUSAL, TURNED
    )  # fmt: skip
    read = x.to(tl.float32) if WIDE else x
    result = tl.dot(read, state, input_precision=PRECISION) * reach[:, None]
    denominator = tl.zeros([C], tl.float32)
    bias = tl.zeros([C], tl.float32)
    if NORMALIZE and (TURNED or CAUSAL):
        norm = load_norm(
            stored, line, period, periods, segment, segments, features, K, DECAY, HAS_CARRY, not CAUSAL
        )
        if not TURNED:
            denominator = tl.sum(x.to(tl.float32) * norm[None, :], 1) * reach
        elif CAUSAL:
            bias = tl.load(weight + lines, mask=inside, other=0.0)
            result += (bias * reach)[:, None] * norm[None, :]
        else:
            result += reach[:, None] * norm[None, :]
    if HAS_DECAY and TURNED:
        mine = load_rows(
            own + (batch * tokens * own_heads + head) * WIDTH, first, rows, own_heads * WIDTH, columns, tokens
        )
        part = block * tl.cast(tl.num_programs(1), tl.int64)
        if not CAUSAL:
            tl.store(extra[1] + part * tokens + lines, tl.sum(result * mine.to(tl.float32), 1), mask=inside)
            if first == start:
                # the state before the period against the gradient of the one behind
                past = load_state(
                    opposite, line, period, periods, segment, segments, square, features, K, V, DECAY, HAS_CARRY,
                    False, TURNED,
                )  # fmt: skip
                passing = tl.sum(tl.sum(state.to(tl.float32) * past.to(tl.float32), 1), 0)
                if NORMALIZE:
                    past_norm = load_norm(
                        opposite,
                        line,
                        period,
                        periods,
                        segment,
                        segments,
                        features,
                        K,
                        DECAY,
                        HAS_CARRY,
                        False,
                    )
                    passing += tl.sum(norm * past_norm, 0)
                tl.store(extra[2] + (part + line) * periods + period, passing * kept)
    low = period * TILES if CAUSAL else tile
    high = tile + 1 if CAUSAL else tl.minimum((period + 1) * TILES, tiles)
    for member in range(1 if CAUSAL else group):
        other_head = state_head if CAUSAL else head * group + member
        left = b + (batch * tokens * other_heads + other_head) * A
        right = c + (batch * tokens * other_heads + other_head) * WIDTH
        for i in range(low, high):
            there = i * C + rows
            y = load_columns(left, i * C, rows, other_heads * A, dims, tokens)
            z = load_rows(right, i * C, rows, other_heads * WIDTH, columns, tokens)
            scores = tl.dot(x, y, input_precision=PRECISION)
            if NORMALIZE and TURNED:
                if CAUSAL:
                    scores += bias[:, None]
                else:
                    at = (batch * tokens + there) * heads + other_head
                    scores += tl.load(weight + at, mask=there < tokens, other=0.0)[None, :]
            if CAUSAL:
                seen = place[:, None] > there[None, :] if READ_BEFORE else place[:, None] >= there[None, :]
            else:
                seen = place[:, None] < there[None, :] if READ_BEFORE else place[:, None] <= there[None, :]
            if HAS_DOCS:
                seen = seen & (owner[:, None] == load_document(docs, batch, there, tokens)[None, :])
            if HAS_DECAY:
                sums, rest, coarse, fine = coordinates(g, i * C, rows, start, tokens, state_heads, TILES * C)
                if READ_BEFORE and not CAUSAL:
                    sums, rest = sums - coarse, rest - fine
                if WIDE:
                    passed = (own_sum[:, None] - sums[None, :]) + (own_rest[:, None] - rest[None, :])
                else:  # bfloat16 has no use for the digits, and the registers other ones
                    passed = (own_sum + own_rest)[:, None] - (sums + rest)[None, :]
                if not CAUSAL:
                    passed = -passed
                scores *= tl.exp2(tl.where(seen, passed, float("-inf")))
            else:
                scores = tl.where(seen, scores, 0.0)
            if NORMALIZE and CAUSAL and not TURNED:
                denominator += tl.sum(scores, 1)
            if WIDE:
                result = tl.dot(scores, z.to(tl.float32), result, input_precision=PRECISION)
            else:
                result = tl.dot(scores.to(z.dtype), z, result, input_precision=PRECISION)
    tl.store(
        out + lines[:, None] * WIDTH + columns[None, :], result.to(out.dtype.element_ty), mask=inside[:, None]
    )
    if NORMALIZE and CAUSAL and not TURNED:  # noqa: SIM102
        if block == 0:
            tl.store(extra[0] + lines, denominator, mask=inside)
    if HAS_DECAY and TURNED:
        mine = load_rows(
            own + (batch * tokens * own_heads + head) * WIDTH, first, rows, own_heads * WIDTH, columns, tokens
        )
        part *= tokens * (group if CAUSAL else 1)
        tl.store(extra[0] + part + lines, tl.sum(result * mine.to(tl.float32), 1), mask=inside)


@triton.jit
def head_output_kernel(
    q, k, v, g, docs, states, norms, carries, carry_norms, spans, out, denominator,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TILES: tl.constexpr,
    HAS_DECAY: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOCS: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Numerators [B, T, H, V] and denominators [B, T, H]: one tile, head and block of values a program."""
    tile, block = tl.program_id(0) // (V // BV), tl.program_id(0) % (V // BV)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    stored = (states, norms, carries, carry_norms, spans)
    add_tiles(
        q, k, v, q, g, docs, denominator, stored, stored, out, (denominator,),
        tile, batch, head, block, tokens, tiles, periods, per_segment, segments,
        heads, state_heads, K, V, K, V, BV, C, TILES, True, False, HAS_DECAY, READ_BEFORE, NORMALIZE, HAS_DOCS,
        HAS_CARRY, WIDE, PRECISION,
    )  # fmt: skip


@triton.jit
def head_gradient_kernel(
    q, k, v, g, docs, do, weight, states, norms, carries, carry_norms, spans,
    ahead, ahead_norms, ahead_carries, ahead_carry_norms, ahead_spans,
    dq, dk, dv, query_products, key_products, crossing, flow,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    HAS_DECAY: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOCS: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of every query head of a state, its dk or its dv: one tile and block of columns a program."""
    group: tl.constexpr = heads // state_heads
    key_blocks: tl.constexpr = K // BK
    roles: tl.constexpr = (group + 1) * key_blocks + V // BV
    tile, role = tl.program_id(0) // roles, tl.program_id(0) % roles
    batch = (tl.program_id(1) // state_heads).to(tl.int64)
    head = tl.program_id(1) % state_heads
    past = (states, norms, carries, carry_norms, spans)
    future = (ahead, ahead_norms, ahead_carries, ahead_carry_norms, ahead_spans)
    if role < group * key_blocks:
        add_tiles(
            do, v, k, q, g, docs, weight, past, past, dq, (query_products,),
            tile, batch, head * group + role // key_blocks, role % key_blocks,
            tokens, tiles, periods, per_segment, segments,
            heads, state_heads, V, V, K, K, BK, C, TILES, True, True, HAS_DECAY, READ_BEFORE, NORMALIZE, HAS_DOCS,
            HAS_CARRY, WIDE, PRECISION,
        )  # fmt: skip
    elif role < (group + 1) * key_blocks:
        add_tiles(
            v, do, q, k, g, docs, weight, future, past, dk, (key_products, crossing, flow),
            tile, batch, head, role % key_blocks, tokens, tiles, periods, per_segment, segments,
            heads, state_heads, V, V, K, K, BK, C, TILES, False, True, HAS_DECAY, READ_BEFORE, NORMALIZE, HAS_DOCS,
            HAS_CARRY, WIDE, PRECISION,
        )  # fmt: skip
    else:
        add_tiles(
            k, q, do, k, g, docs, weight, future, past, dv, (key_products,),
            tile, batch, head, role - (group + 1) * key_blocks, tokens, tiles, periods, per_segment, segments,
            heads, state_heads, K, V, K, V, BV, C, TILES, False, False, HAS_DECAY, READ_BEFORE, NORMALIZE, HAS_DOCS,
            HAS_CARRY, WIDE, PRECISION,
        )  # fmt: skip


@triton.jit
def decay_gradient_kernel(
    query_products, key_products, crossing, flow, dg, batches, tokens, periods,
    heads: tl.constexpr, state_heads: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr, READ_BEFORE: tl.constexpr,
):  # fmt: skip
    """Gradient of log decays [B, T, M]: all that passes over a token, from a key before it to a reader at it or behind.

    Inside a period these are the readers' products from the token on, less the keys' from it on, whose readers include
    those beyond; what they took of the keys comes from `crossing` and `flow`, and nothing is summed over the sequence.
    """
    period = tl.program_id(0)
    batch = (tl.program_id(1) // state_heads).to(tl.int64)
    head = tl.program_id(1) % state_heads
    group: tl.constexpr = heads // state_heads
    place = period * SPAN + tl.arange(0, SPAN)
    inside = place < tokens
    readers = tl.zeros([SPAN], tl.float32)
    keys = tl.zeros([SPAN], tl.float32)
    through = 0.0
    for block in tl.static_range(BLOCKS):
        lines = (block * batches + batch) * tokens + place
        for member in tl.static_range(group):
            readers += tl.load(query_products + lines * heads + head * group + member, mask=inside, other=0.0)
        lines = lines * state_heads + head
        keys += tl.load(key_products + lines, mask=inside, other=0.0)
        through += tl.sum(tl.load(crossing + lines, mask=inside, other=0.0), 0)
        through += tl.load(flow + ((block * batches + batch) * state_heads + head) * periods + period)
    found = tl.cumsum(readers - keys, 0, reverse=True) + through
    if READ_BEFORE:
        found -= readers
    at = (batch * tokens + place) * state_heads + head
    tl.store(dg + at, found.to(dg.dtype.element_ty), mask=inside)
