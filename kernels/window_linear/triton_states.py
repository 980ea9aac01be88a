"""States between chunks: sums of phi(k) v^T over the keys behind a chunk, or of phi(q) g^T over the queries ahead.

A sequence is cut into segments that are scanned side by side, each from nothing; a third kernel sums the segments'
totals, and whoever reads a state adds its segment's carry. Sums are held and stored as [V, F], values first: features
come out of a product by rows of tokens, where their softmax needs no other warp, and enter the next one as they stand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_common import (
    LOG2E,
    document,
    load_code,
    load_rows,
    masked_features,
)


@triton.jit
def key_states_kernel(
    k, v, weight, codes, reach, start, start_norm, states, norms, totals, total_norms, key_lse,
    key_tokens, tokens, base, chunks, per_segment, limit, last_tile, segments,
    kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr,
    HAS_CODES: tl.constexpr, HAS_REACH: tl.constexpr, HAS_START: tl.constexpr, HAS_TOTALS: tl.constexpr,
    IS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Entering states [B, M, chunks, 2, V, F] and norms [.., 2, F] of a segment, its total, log sums [B, M, 2, S].

    With SPLIT a program has one half of the features, softmax(y) or softmax(-y), and there are twice as many.
    """
    tile, half = tl.program_id(0), 0
    if SPLIT:
        tile, half = tl.program_id(0) // 2, tl.program_id(0) % 2
    segment = tl.program_id(1) % segments
    row_head = (tl.program_id(1) // segments).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    kv_head = head // (state_heads // kv_heads)
    k += (batch * key_tokens * kv_heads + kv_head) * K
    v += (batch * key_tokens * kv_heads + kv_head) * V + tile * BV
    key_lse += (row_head * 2 + half) * key_tokens
    rows, dims, lanes = tl.arange(0, C), tl.arange(0, K), tl.arange(0, BV)
    features, values = tl.arange(0, F), tile * BV + tl.arange(0, BV)
    projection = tl.load(weight + head * K * F + dims[:, None] * F + features[None, :])
    if SPLIT:
        projection = tl.where(half == 0, projection, -projection)
    place = values[:, None] * F + features[None, :]
    # carried and final states are [F, V], as their owners have them
    outer = features[None, :] * V + values[:, None]
    # sums over the keys of a tile as a product with ones, all rows alike: a sum over rows goes through shared memory
    ones = tl.full([16, C], 1.0, k.dtype.element_ty)
    copies = tl.arange(0, 16)[:, None]
    line, first_row = features[None, :] + 0 * copies, (copies == 0) & (features >= 0)[None, :]
    # of the first or only half, and of the second where the program has both
    one = tl.zeros([BV, F], tl.float32)
    two = tl.zeros([BV, F], tl.float32)
    one_norm = tl.zeros([16, F], tl.float32)
    two_norm = tl.zeros([16, F], tl.float32)
    if HAS_START:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if segment == 0:
            from_half = row_head * 2 + half
            one = tl.load(start + from_half * F * V + outer)
            one_norm += tl.load(start_norm + from_half * F + features)[None, :]
            if not SPLIT:
                two = tl.load(start + (from_half + 1) * F * V + outer)
                two_norm += tl.load(start_norm + (from_half + 1) * F + features)[None, :]
    if HAS_REACH:
        limit = key_tokens - tl.load(reach + batch * tokens + tokens - 1)
    first_chunk = segment * per_segment
    end_chunk = tl.minimum(first_chunk + per_segment, chunks)
    if HAS_TOTALS:
        end_chunk = tl.where(segment == segments - 1, last_tile, end_chunk)
    for chunk in range(first_chunk, end_chunk):
        here = base + chunk * C
        x = load_rows(k, here, rows, kv_heads * K, dims, key_tokens)
        y = load_rows(v, here, rows, kv_heads * V, lanes, key_tokens)
        if chunk < chunks:
            to = (row_head * chunks + chunk) * 2 + half
            tl.store(states + to * F * V + place, one.to(states.dtype.element_ty))
            if tile == 0:
                tl.store(norms + to * F + line, one_norm, mask=first_row)
            if not SPLIT:
                tl.store(states + (to + 1) * F * V + place, two.to(states.dtype.element_ty))
                if tile == 0:
                    tl.store(norms + (to + 1) * F + line, two_norm, mask=first_row)
        position = here + rows
        inside = (position >= 0) & (position < key_tokens)
        logits = tl.dot(x, projection, input_precision=PRECISION)
        seen = inside & (position < limit)
        if HAS_CODES:
            before = load_code(codes, batch, here - 1, key_tokens)
            after = load_code(codes, batch, tl.minimum(here + C, key_tokens) - 1, key_tokens)
            code = tl.load(codes + batch * key_tokens + position, mask=seen, other=-1)
            seen = seen & (code == after)
            kept = tl.where(before == after, 1.0, 0.0)
            one, two, one_norm, two_norm = one * kept, two * kept, one_norm * kept, two_norm * kept
        turned = tl.trans(y)
        # one half after the other: both at once need more registers than there are
        phi, lse = masked_features(logits, seen, False)
        if tile == 0:
            tl.store(key_lse + position, lse, mask=inside)
        phi = phi.to(y.dtype)
        one_norm = tl.dot(ones, phi, one_norm, input_precision=PRECISION)
        one = tl.dot(turned, phi, one, input_precision=PRECISION)
        if not SPLIT:
            phi, lse = masked_features(logits, seen, True)
            if tile == 0:
                tl.store(key_lse + key_tokens + position, lse, mask=inside)
            phi = phi.to(y.dtype)
            two_norm = tl.dot(ones, phi, two_norm, input_precision=PRECISION)
            two = tl.dot(turned, phi, two, input_precision=PRECISION)
    if HAS_TOTALS:
        to = (row_head * segments + segment) * 2 + half
        if HAS_CODES:
            # the sums are of the document open at the last tile's end; the last segment's total serves the last token
            end = tl.minimum(base + end_chunk * C, key_tokens) - 1
            kept = load_code(codes, batch, end, key_tokens) == load_code(
                codes, batch, key_tokens - 1, key_tokens
            )
            alive = tl.where((segment < segments - 1) | kept, 1.0, 0.0)
            one, two, one_norm, two_norm = one * alive, two * alive, one_norm * alive, two_norm * alive
        if IS_FINAL:
            place = outer
        tl.store(totals + to * F * V + place, one)
        if tile == 0:
            tl.store(total_norms + to * F + line, one_norm, mask=first_row)
        if not SPLIT:
            tl.store(totals + (to + 1) * F * V + place, two)
            if tile == 0:
                tl.store(total_norms + (to + 1) * F + line, two_norm, mask=first_row)


@triton.jit
def query_states_kernel(
    q, do, log_inverse, delta, weight, factor, query_lse, codes, states, norms, totals, total_norms,
    key_tokens, tokens, prefix, chunks, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_CODES: tl.constexpr, HAS_TOTALS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The mirror image: sums of a phi(q) / den [do, -do.o] over the query chunks behind each chunk."""
    tile, half = tl.program_id(0), 0
    if SPLIT:
        tile, half = tl.program_id(0) // 2, tl.program_id(0) % 2
    segment = tl.program_id(1) % segments
    row_head = (tl.program_id(1) // segments).to(tl.int64)
    batch, state_head = row_head // state_heads, row_head % state_heads
    group: tl.constexpr = heads // state_heads
    rows, dims, lanes = tl.arange(0, C), tl.arange(0, K), tl.arange(0, BV)
    features, values = tl.arange(0, F), tile * BV + tl.arange(0, BV)
    place = values[:, None] * F + features[None, :]
    one = tl.zeros([BV, F], tl.float32)
    two = tl.zeros([BV, F], tl.float32)
    one_norm = tl.zeros([F], tl.float32)
    two_norm = tl.zeros([F], tl.float32)
    first_chunk = segment * per_segment
    end_chunk = tl.minimum(first_chunk + per_segment, chunks)
    for step in range(0, end_chunk - first_chunk):
        chunk = end_chunk - 1 - step
        here = chunk * C
        to = (row_head * chunks + chunk) * 2 + half
        tl.store(states + to * F * V + place, one.to(states.dtype.element_ty))
        if tile == 0:
            tl.store(norms + to * F + features, one_norm)
        if not SPLIT:
            tl.store(states + (to + 1) * F * V + place, two.to(states.dtype.element_ty))
            if tile == 0:
                tl.store(norms + (to + 1) * F + features, two_norm)
        position = here + rows
        seen = position < tokens
        if HAS_CODES:
            opening = load_code(codes, batch, prefix + here, key_tokens)
            behind = load_code(codes, batch, prefix + here + C, key_tokens)
            owner = document(tl.load(codes + batch * key_tokens + prefix + position, mask=seen, other=0))
            seen = seen & (owner == opening)
            kept = tl.where((opening == behind) & (here + C < tokens), 1.0, 0.0)
            one, two, one_norm, two_norm = one * kept, two * kept, one_norm * kept, two_norm * kept
        for member in tl.static_range(group):
            head = state_head * group + member
            row = batch * heads + head
            x = load_rows(q + (batch * tokens * heads + head) * K, here, rows, heads * K, dims, tokens)
            y = load_rows(
                do + (batch * tokens * heads + head) * V + tile * BV, here, rows, heads * V, lanes, tokens
            )
            projection = tl.load(weight + head * K * F + dims[:, None] * F + features[None, :])
            if SPLIT:
                projection = tl.where(half == 0, projection, -projection)
            # the factors of a row go into the exponent; a row without weight has log2(0) there
            offset = tl.load(log_inverse + row * tokens + position, mask=seen, other=float("-inf"))
            if HAS_FACTOR:
                offset += tl.log2(tl.load(factor + head))
            shift = tl.load(delta + row * tokens + position, mask=seen, other=0.0)
            line = query_lse + (row * 2 + half) * tokens + position
            lse = tl.load(line, mask=seen, other=0.0)
            logits = tl.dot(x, projection, input_precision=PRECISION)
            turned = tl.trans(y)
            phi = tl.exp2(logits * LOG2E + (offset - lse)[:, None])
            one_norm -= tl.sum(phi * shift[:, None], 0)
            one = tl.dot(turned, phi.to(y.dtype), one, input_precision=PRECISION)
            if not SPLIT:
                lse = tl.load(line + tokens, mask=seen, other=0.0)
                phi = tl.exp2(logits * -LOG2E + (offset - lse)[:, None])
                two_norm -= tl.sum(phi * shift[:, None], 0)
                two = tl.dot(turned, phi.to(y.dtype), two, input_precision=PRECISION)
    if HAS_TOTALS:
        to = (row_head * segments + segment) * 2 + half
        tl.store(totals + to * F * V + place, one)
        if tile == 0:
            tl.store(total_norms + to * F + features, one_norm)
        if not SPLIT:
            tl.store(totals + (to + 1) * F * V + place, two)
            if tile == 0:
                tl.store(total_norms + (to + 1) * F + features, two_norm)


@triton.jit
def carry_kernel(
    totals, carries, final, codes, key_tokens, origin, span, segments, state_heads, size,
    REVERSE: tl.constexpr, HAS_CODES: tl.constexpr, HAS_FINAL: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Totals [B, M, segments, 2 V F] -> what enters each segment, and, as [2 F, V], what leaves the last one."""
    row_head = tl.program_id(1).to(tl.int64)
    batch = row_head // state_heads
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    carry = tl.zeros([BLOCK], tl.float32)
    for step in range(0, segments):
        segment = segments - 1 - step if REVERSE else step
        at = (row_head * segments + segment) * size + place
        tl.store(carries + at, carry.to(carries.dtype.element_ty), mask=inside)
        if HAS_CODES:
            # a segment that begins and ends in one document passes on what entered it
            low, high = origin + segment * span, origin + (segment + 1) * span
            if REVERSE:
                same = (
                    load_code(codes, batch, low, key_tokens) == load_code(codes, batch, high, key_tokens)
                ) & (high < key_tokens)
            else:
                end = tl.where(segment == segments - 1, key_tokens, tl.minimum(high, key_tokens)) - 1
                same = load_code(codes, batch, low - 1, key_tokens) == load_code(
                    codes, batch, end, key_tokens
                )
            carry = tl.where(same, carry, 0.0)
        carry += tl.load(totals + at, mask=inside, other=0.0)
    if HAS_FINAL:
        half, rest = place // (V * F), place % (V * F)
        tl.store(final + row_head * size + half * (V * F) + (rest % F) * V + rest // F, carry, mask=inside)
