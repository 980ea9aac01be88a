"""Outputs and gradients of linear attention with a decay for every key dimension, chunk by chunk, on tensor cores.

Between a key s and a reader t of one block lies its middle: exp(G_t - G_s) = exp(G_t - G_middle) exp(G_middle - G_s),
so all pairs of a block are one product of two scaled tiles, as long as no factor overflows. Where a chunk forgets too
much for that, it is halved: pairs across the middle have factors of at most one, whatever the decays, and are a masked
product; the blocks on either side go on. Blocks of one token need no decay, so every decay is exact. How often a chunk
is halved follows from its own decays, inside the kernel: not at all while neither half forgets more than exp(-41).

The exponents G_t - G_middle are products of the log decays with a matrix of 0, 1 and -1: sums of their own terms, never
differences of long sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_linear.triton_common import (
    FLOOR,
    LOG2E,
    in_halves,
    load_columns,
    load_document,
    load_norm,
    load_rows,
    load_state,
)

CAP: tl.constexpr = tl.constexpr(60.0)
"""Largest exponent of two in a factor, so that a product of two, of pairs that nobody sees, is finite too."""


@triton.jit
def in_base_two(x):
    """Log decays as they are given -> base 2, float32."""
    return tl.maximum(x.to(tl.float32) * LOG2E, FLOOR)


@triton.jit
def strongest(decays, rows, C: tl.constexpr):
    """Of [C, dims] the strongest decay of one token, and of one half of the chunk, both positive."""
    early = tl.sum(tl.where((rows < C // 2)[:, None], decays, 0.0), 0)
    halves = tl.minimum(early, tl.sum(decays, 0) - early)
    return -tl.min(tl.min(decays, 0), 0), -tl.min(halves, 0)


@triton.jit
def halvings(token, half):
    """How often a chunk of 64 is halved, at most six times."""
    count = 0
    for i in tl.static_range(6):
        count += tl.where(token * (32 >> i) > CAP, 1, 0)
    return tl.where(half > CAP, count, 0)


@triton.jit
def row_sums(high, low, rows, middle, last):
    """Decays from `middle` up to and with `last` (less those from behind `last` to before `middle`), [C, dims]."""
    other = rows[None, :]
    after = (other >= middle[:, None]) & (other <= last[:, None])
    chosen = after.to(tl.float16) - ((other > last[:, None]) & (other < middle[:, None])).to(tl.float16)
    return tl.dot(chosen, low, tl.dot(chosen, high))


@triton.jit
def column_sums(high, low, rows, middle, last):
    """The same of transposed tiles, [dims, C]."""
    other = rows[:, None]
    after = (other >= middle[None, :]) & (other <= last[None, :])
    chosen = after.to(tl.float16) - ((other > last[None, :]) & (other < middle[None, :])).to(tl.float16)
    return tl.dot(low, chosen, tl.dot(high, chosen))


@triton.jit
def level_pairs(rows, shift, final, CAUSAL: tl.constexpr, READ_BEFORE: tl.constexpr):
    """Which pairs (own row, other row) a level of blocks of 2^shift rows makes, and each row's middle.

    Before the `final` level those of a reader in the second and a key in the first half; CAUSAL: own rows read.
    """
    block = rows >> shift
    middle = (block << shift) + tl.maximum((1 << shift) >> 1, 1)
    second = rows >= middle
    if CAUSAL:
        order = rows[:, None] > rows[None, :] if READ_BEFORE else rows[:, None] >= rows[None, :]
        across = second[:, None] & (rows < middle)[None, :]
    else:
        order = rows[:, None] < rows[None, :] if READ_BEFORE else rows[:, None] <= rows[None, :]
        across = (rows < middle)[:, None] & second[None, :]
    same = block[:, None] == block[None, :]
    return same & order & (across | final), middle


@triton.jit
def add_products(
    a, b, c, g, docs, stored, out, denominators,
    chunk, batch, head, block, tokens, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr,
    CAUSAL: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOCS: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
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
    token, half = 0.0, 0.0
    for part in tl.static_range(K // BK):
        dims = part * BK + tl.arange(0, BK)
        decays = in_base_two(load_rows(g, first, rows, state_heads * K, dims, tokens))
        by_token, by_half = strongest(decays, rows, C)
        token, half = tl.maximum(token, by_token), tl.maximum(half, by_half)
    result = tl.zeros([C, BV], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    levels = halvings(token, half)
    for member in range(1 if CAUSAL else group):
        other_head = state_head if CAUSAL else head * group + member
        left = b + (batch * tokens * other_heads + other_head) * K
        scores = tl.zeros([C, C], tl.float32)
        for level in range(0, levels + 1):
            # always `rows`, but the compiler does not know it: nothing of a level may wait for it in registers
            lanes = rows + (level >> 3)
            pairs, middle = level_pairs(lanes, 6 - level, level == levels, CAUSAL, READ_BEFORE)
            found = tl.zeros([C, C], tl.float32)
            for part in tl.static_range(K // BK):
                dims = part * BK + tl.arange(0, BK)
                high, low = in_halves(in_base_two(load_rows(g, first, lanes, state_heads * K, dims, tokens)))
                factor = tl.exp2(
                    tl.minimum(row_sums(high, low, lanes, middle, lanes - own_shift) * sign, CAP)
                )
                x = load_rows(a, first, lanes, own_heads * K, dims, tokens)
                own = x.to(tl.float32) * factor
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
    for part in tl.static_range(K // BK):
        dims = part * BK + tl.arange(0, BK)
        high, low = in_halves(in_base_two(load_rows(g, first, rows, state_heads * K, dims, tokens)))
        outside = (
            row_sums(high, low, rows, tl.zeros([C], tl.int32) + (0 if CAUSAL else C), rows - own_shift) * sign
        )
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
    READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK columns of dq, dk and the gradient of log decays, of one chunk and head of the state.

    A decay's gradient is all that passes over it: what readers in the chunk take from it on, less what is read of keys
    from it on, and of the chunk's whole what passes to readers beyond, from its keys and from the state before it.
    """
    group: tl.constexpr = heads // state_heads
    line = batch * state_heads + head
    rows, dims, values = tl.arange(0, C), block * BK + tl.arange(0, BK), tl.arange(0, V)
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
    token, half = strongest(decays, rows, C)
    levels = halvings(token, half)
    high, low = in_halves(decays)
    kept = 1.0
    owner = tl.zeros([C], tl.int32)
    if HAS_DOCS:
        owner = load_document(docs, batch, place, tokens)
        before = load_document(docs, batch, first - 1, tokens)
        after = load_document(docs, batch, first + C - 1, tokens)
        same = owner[:, None] == load_document(docs, batch, first + rows, tokens)[None, :]
        kept = tl.where(before == after, 1.0, 0.0)
    square = dims[None, :] * V + values[:, None]
    norm = tl.zeros([BK], tl.float32)
    if NORMALIZE:
        norm = load_norm(past, line, chunk, periods, segment, segments, dims, K, 2, HAS_CARRY, False)
    # the queries' side, one head after the other; `readers` is what their products q.dq come to
    readers = tl.zeros([C, BK], tl.float32)
    for member in range(group):
        own = head * group + member
        lines = (batch * tokens + place) * heads + own
        incoming = load_rows(do + (batch * tokens * heads + own) * V, first, rows, heads * V, values, tokens)
        ahead = load_state(
            past, line, chunk, periods, segment, segments, square, dims, K, V, 2, HAS_CARRY, False, True
        )
        for_q = tl.dot(incoming.to(ahead.dtype), ahead, input_precision=PRECISION)
        scores = tl.dot(
            incoming, load_columns(v, first, rows, state_heads * V, values, tokens), input_precision=PRECISION
        )
        if NORMALIZE:
            bias = tl.load(weight + lines, mask=inside, other=0.0)
            for_q += bias[:, None] * norm[None, :]
            scores += bias[:, None]
        for_q *= tl.exp2(row_sums(high, low, rows, tl.zeros([C], tl.int32), rows - shift))
        if HAS_DOCS:
            for_q = tl.where((owner == before)[:, None], for_q, 0.0)
            scores = tl.where(same, scores, 0.0)
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
        tl.store(dq + lines[:, None] * K + dims[None, :], for_q.to(dq.dtype.element_ty), mask=inside[:, None])
        queries = load_rows(q + (batch * tokens * heads + own) * K, first, rows, heads * K, dims, tokens)
        readers += queries.to(tl.float32) * for_q
    # the keys' side
    held = load_rows(v, first, rows, state_heads * V, values, tokens)
    behind = load_state(
        future, line, chunk, periods, segment, segments, square, dims, K, V, 2, HAS_CARRY, True, True
    )
    ahead = load_state(
        past, line, chunk, periods, segment, segments, square, dims, K, V, 2, HAS_CARRY, False, True
    )
    through = tl.sum(behind.to(tl.float32) * ahead.to(tl.float32), 0)
    for_k = tl.dot(held.to(behind.dtype), behind, input_precision=PRECISION)
    if NORMALIZE:
        behind_norm = load_norm(future, line, chunk, periods, segment, segments, dims, K, 2, HAS_CARRY, True)
        for_k += behind_norm[None, :]
        through += norm * behind_norm
    for_k *= tl.exp2(-row_sums(high, low, rows, tl.zeros([C], tl.int32) + C, rows))
    if HAS_DOCS:
        for_k = tl.where((owner == after)[:, None], for_k, 0.0)
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
    through = through * tl.exp2(whole) * kept + tl.sum(keys.to(tl.float32) * for_k, 0)
    for member in range(group):
        own = head * group + member
        turned = load_columns(do + (batch * tokens * heads + own) * V, first, rows, heads * V, values, tokens)
        scores = tl.dot(held, turned, input_precision=PRECISION)
        if NORMALIZE:
            at = (batch * tokens + first + rows) * heads + own
            scores += tl.load(weight + at, mask=first + rows < tokens, other=0.0)[None, :]
        if HAS_DOCS:
            scores = tl.where(same, scores, 0.0)
        for level in range(0, levels + 1):
            lanes = rows + (level >> 3)
            pairs, middle = level_pairs(lanes, 6 - level, level == levels, False, READ_BEFORE)
            queries = load_rows(q + (batch * tokens * heads + own) * K, first, lanes, heads * K, dims, tokens)
            up = tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP)
            right = queries.to(tl.float32) * tl.exp2(up)
            down = tl.exp2(tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP))
            left = tl.where(pairs, scores, 0.0)
            if WIDE:
                for_k += down * tl.dot(left, right, input_precision=PRECISION)
            else:
                for_k += down * tl.dot(left.to(held.dtype), right.to(held.dtype))
    lines = (batch * tokens + place) * state_heads + head
    to = lines[:, None] * K + dims[None, :]
    tl.store(dk + to, for_k.to(dk.dtype.element_ty), mask=inside[:, None])
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
    found = tl.cumsum(readers - keys.to(tl.float32) * for_k, 0, reverse=True) + through[None, :]
    if READ_BEFORE:
        found -= readers
    tl.store(dg + to, found.to(dg.dtype.element_ty), mask=inside[:, None])


@triton.jit
def key_output_kernel(
    q, k, v, g, docs, states, norms, carries, carry_norms, spans, out, denominator,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Numerators [B, T, H, V] and denominators [B, T, H]: one chunk, head and block of values a program."""
    chunk, block = tl.program_id(0) // (V // BV), tl.program_id(0) % (V // BV)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    add_products(
        q, k, v, g, docs, (states, norms, carries, carry_norms, spans), out, denominator,
        chunk, batch, tl.program_id(1) % heads, block, tokens, periods, per_segment, segments,
        heads, state_heads, K, V, BK, BV, C, True, READ_BEFORE, NORMALIZE, HAS_DOCS, HAS_CARRY, WIDE, PRECISION,
    )  # fmt: skip


@triton.jit
def key_gradient_kernel(
    q, k, v, g, docs, do, weight, states, norms, carries, carry_norms, spans,
    ahead, ahead_norms, ahead_carries, ahead_carry_norms, ahead_spans, dq, dk, dv, dg,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the decays' gradient, or dv: one chunk, head of the state and block of columns a program."""
    key_blocks: tl.constexpr = K // COLUMNS
    roles: tl.constexpr = key_blocks + V // BV
    chunk, role = tl.program_id(0) // roles, tl.program_id(0) % roles
    batch = (tl.program_id(1) // state_heads).to(tl.int64)
    head = tl.program_id(1) % state_heads
    future = (ahead, ahead_norms, ahead_carries, ahead_carry_norms, ahead_spans)
    if role < key_blocks:
        add_sums(
            q, k, v, g, docs, do, weight, (states, norms, carries, carry_norms, spans), future, dq, dk, dg,
            chunk, batch, head, role, tokens, periods, per_segment, segments,
            heads, state_heads, K, V, COLUMNS, C, READ_BEFORE, NORMALIZE, HAS_DOCS, HAS_CARRY, WIDE, PRECISION,
        )  # fmt: skip
    else:
        add_products(
            k, q, do, g, docs, future, dv, weight,
            chunk, batch, head, role - key_blocks, tokens, periods, per_segment, segments,
            heads, state_heads, K, V, BK, BV, C, False, READ_BEFORE, NORMALIZE, HAS_DOCS, HAS_CARRY, WIDE, PRECISION,
        )  # fmt: skip
