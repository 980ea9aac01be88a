"""Gradients of window_linear's keys and values where the window is a whole number of chunks.

See `triton_aligned_backward` for the queries' side and the notation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_aligned_forward import load_codes
from linearize.kernels.window_linear.triton_common import LOG2E, document, load_code, load_rows


@triton.jit
def scores_of_chunk(
    keys, held, own_q, own_do, chunk, rows, dims, values, code, codes, batch, prefix, row,
    maximum, log_inverse, delta, share, scale, tokens, key_tokens,
    heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    HAS_CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, do, scores with the rows' offsets in them, and dw of one chunk of queries [C] and one tile of keys [C]."""
    place = chunk * C + rows
    there = (place >= 0) & (place < tokens)
    x = load_rows(own_q, chunk * C, rows, heads * K, dims, tokens)
    y = load_rows(own_do, chunk * C, rows, heads * V, values, tokens)
    top = tl.load(maximum + row + place, mask=there, other=0.0)
    # a query that does not exist has log2(0)
    log_over = tl.load(log_inverse + row + place, mask=there, other=float("-inf"))
    shift = tl.load(delta + row + place, mask=there, other=0.0)
    offset = share + log_over - top
    scores = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * scale + offset[:, None]
    if HAS_CODES:
        owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=there, other=0))
        scores = tl.where(code[None, :] == owner[:, None], scores, float("-inf"))
    dw = tl.dot(y, tl.trans(held), input_precision=PRECISION) - shift[:, None]
    return x, y, scores, dw


@triton.jit
def without_spare(ds, balance, place_of_top, row, chunk, rows, position, tokens, C: tl.constexpr):
    """The gradient of each row's largest score less what keeps the row's sum at zero."""
    place = chunk * C + rows
    there = (place >= 0) & (place < tokens)
    spare = tl.load(balance + row + place, mask=there, other=0.0)
    where = tl.load(place_of_top + row + place, mask=there, other=-1)
    return tl.where(where[:, None] == position[None, :], ds - spare[:, None], ds)


@triton.jit
def aligned_key_gradient_kernel(
    q, k, v, do, query_map, key_map, weight, factor, codes, past_codes, key_lse, query_lse,
    states, norms, carries, carry_norms, maximum, log_inverse, delta, balance, place_of_top,
    dk, dv, dy,
    tokens, key_tokens, prefix, base, chunks, per_segment, segments, first, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_CODES: tl.constexpr, HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, TRAIN_MAPS: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile, and the gradient dy of k's projection, from every query head of the group.

    Without `INPUTS`, as where layers learn on a teacher's frozen projections, dy alone: a third of the products.

    Tiles are [queries, keys] and gradients are summed as [K, keys] and [V, keys]: what is known of a query then costs a
    thread two registers instead of sixteen, and no product is transposed on its way into the next one.
    """
    i = first + tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    group: tl.constexpr = heads // kv_heads
    shared: tl.constexpr = heads // state_heads
    k += (batch * key_tokens * kv_heads + kv_head) * K
    v += (batch * key_tokens * kv_heads + kv_head) * V
    rows, dims, values, columns = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V), tl.arange(0, F)
    here = base + i * C
    position = here + rows
    inside = (position >= 0) & (position < key_tokens)
    keys = load_rows(k, here, rows, kv_heads * K, dims, key_tokens)
    held = load_rows(v, here, rows, kv_heads * V, values, key_tokens)
    code = tl.zeros([C], tl.int32)
    if HAS_CODES:
        code = load_codes(codes, batch, position, key_tokens)
        past_code = load_codes(past_codes, batch, position, key_tokens)
    # in the own chunk a query sees a key of the window here, in the chunk a window later it has it behind
    mine = rows[:, None] >= rows[None, :]
    # of a zero that the compiler knows, selections would be made of sixteen-bit numbers, one by one
    nothing = scale - scale
    for_k = tl.zeros([K, C], tl.float32)
    for_v = tl.zeros([V, C], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        state_head = head // shared
        row = (batch * heads + head) * tokens
        own_q = q + (batch * tokens * heads + head) * K
        own_do = do + (batch * tokens * heads + head) * V
        line = batch * state_heads + state_head
        place = i * C + rows
        there = place < tokens
        # no query is ahead of the keys behind the last chunk
        scanned = inside & (position < base + chunks * C)
        last = tl.minimum(i, chunks - 1)
        at = (line * chunks + last) * 2
        origin = at
        reader = tl.where(scanned, 1.0, 0.0)
        seen = mine
        if HAS_CODES:
            owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=there, other=0))
            ahead = load_code(codes, batch, prefix + (i + 1) * C, key_tokens)
            reader = tl.where((past_code == ahead) & scanned, 1.0, 0.0)
            seen = mine & (past_code[None, :] == owner[:, None])
        if HAS_CARRY:
            segment = last // per_segment
            origin = (line * segments + segment) * 2
            same = segment < segments - 1
            if HAS_CODES:
                behind = load_code(codes, batch, prefix + (segment + 1) * per_segment * C, key_tokens)
                same = same & (ahead == behind)
        offset = tl.load(log_inverse + row + place, mask=there, other=float("-inf"))
        if HAS_FACTOR:
            offset += tl.log2(tl.load(factor + head))
        own_lse = key_lse + line * 2 * key_tokens + position
        query_line = query_lse + row * 2 + place
        far_q = load_rows(own_q, i * C, rows, heads * K, dims, tokens)
        far_do = load_rows(own_do, i * C, rows, heads * V, values, tokens)
        shift = tl.load(delta + row + place, mask=there, other=0.0)
        dw = tl.dot(far_do, tl.trans(held), input_precision=PRECISION) - shift[:, None]
        far = tl.where(seen, dw, nothing).to(keys.dtype)
        projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
        query_projection = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
        pairs = tl.zeros([C, C], tl.float32)
        for_y = tl.zeros([F, C], tl.float32)
        place_of_sum = values[:, None] * F + columns[None, :]
        for half in range(2):
            sign = LOG2E - 2.0 * LOG2E * half
            lse = tl.load(own_lse + half * key_tokens, mask=scanned, other=float("inf"))
            key_logits = tl.dot(tl.trans(projection), tl.trans(keys), input_precision=PRECISION)
            wide_k = tl.exp2(key_logits * sign - lse[None, :])
            phi_k = wide_k.to(keys.dtype)
            lse = offset - tl.load(query_line + half * tokens, mask=there, other=0.0)
            if INPUTS:
                logits = tl.dot(far_q, query_projection, input_precision=PRECISION)
                phi = tl.exp2(logits * sign + lse[:, None]).to(keys.dtype)
                pairs = tl.dot(phi, phi_k, pairs, input_precision=PRECISION)
            # made again, not turned: queries are the columns here
            logits = tl.dot(tl.trans(query_projection), tl.trans(far_q), input_precision=PRECISION)
            phi = tl.exp2(logits * sign + lse[None, :]).to(keys.dtype)
            for_phi = tl.dot(phi, far, input_precision=PRECISION)
            if (shared == 1) or (member == 0):
                read_k, read_v = phi_k, held
                if HAS_CODES:
                    read_k = (phi_k.to(tl.float32) * reader[None, :]).to(keys.dtype)
                    read_v = (held.to(tl.float32) * reader[:, None]).to(keys.dtype)
                if WIDE:
                    read_k, read_v = read_k.to(tl.float32), read_v.to(tl.float32)
                norm = tl.load(norms + (at + half) * F + columns)
                sums = tl.load(states + (at + half) * F * V + place_of_sum)
                if HAS_CARRY:
                    from_carry = columns < tl.where(same, F, 0)
                    norm += tl.load(carry_norms + (origin + half) * F + columns, mask=from_carry, other=0.0)
                    carry = carries + (origin + half) * F * V + place_of_sum
                    sums += tl.load(carry, mask=from_carry[None, :], other=0.0)
                if INPUTS:
                    for_v = tl.dot(sums, read_k, for_v, input_precision=PRECISION)
                for_phi = tl.dot(tl.trans(sums), tl.trans(read_v), for_phi, input_precision=PRECISION)
                for_phi += norm[:, None] * reader[None, :]
            for_phi *= wide_k
            spread = tl.sum(for_phi, 0)
            for_y += (1.0 - 2.0 * half) * (for_phi - wide_k * spread[None, :])
        if INPUTS:
            pairs = tl.where(seen, pairs, nothing)
            for_v = tl.dot(tl.trans(far_do), pairs.to(keys.dtype), for_v, input_precision=PRECISION)
        if TRAIN_MAPS:
            to = ((batch * key_tokens + position) * heads + head)[None, :] * F + columns[:, None]
            tl.store(dy + to, for_y.to(dy.dtype.element_ty), mask=inside[None, :])
        if INPUTS:
            if LAG > 0:
                # in units of the scores' gradient, to which the window adds
                for_y *= LOG2E / scale
            for_k = tl.dot(projection, for_y.to(keys.dtype), for_k, input_precision=PRECISION)
        if INPUTS and LAG > 0:
            share = tl.log2(tl.load(weight + head))
            x, y, scores, dw = scores_of_chunk(
                keys, held, own_q, own_do, i - LAG, rows, dims, values, code, codes, batch, prefix, row,
                maximum, log_inverse, delta, share, scale, tokens, key_tokens, heads, K, V, C, HAS_CODES, PRECISION,
            )  # fmt: skip
            weights = tl.where(mine, tl.exp2(scores), nothing)
            ds = weights * dw
            ds = without_spare(ds, balance, place_of_top, row, i - LAG, rows, position, tokens, C)
            for_k = tl.dot(tl.trans(x), ds.to(keys.dtype), for_k, input_precision=PRECISION)
            for_v = tl.dot(tl.trans(y), weights.to(keys.dtype), for_v, input_precision=PRECISION)
            if LAG > 1:
                for chunk in range(tl.maximum(i - LAG + 1, 0), tl.minimum(i, chunks)):
                    x, y, scores, dw = scores_of_chunk(
                        keys, held, own_q, own_do, chunk, rows, dims, values, code, codes, batch, prefix, row,
                        maximum, log_inverse, delta, share, scale, tokens, key_tokens,
                        heads, K, V, C, HAS_CODES, PRECISION,
                    )  # fmt: skip
                    weights = tl.exp2(scores)
                    ds = weights * dw
                    ds = without_spare(ds, balance, place_of_top, row, chunk, rows, position, tokens, C)
                    for_k = tl.dot(tl.trans(x), ds.to(keys.dtype), for_k, input_precision=PRECISION)
                    for_v = tl.dot(tl.trans(y), weights.to(keys.dtype), for_v, input_precision=PRECISION)
            x, y, scores, dw = scores_of_chunk(
                keys, held, own_q, own_do, i, rows, dims, values, code, codes, batch, prefix, row,
                maximum, log_inverse, delta, share, scale, tokens, key_tokens, heads, K, V, C, HAS_CODES, PRECISION,
            )  # fmt: skip
            weights = tl.where(mine, nothing, tl.exp2(scores))
            ds = weights * dw
            ds = without_spare(ds, balance, place_of_top, row, i, rows, position, tokens, C)
            for_k = tl.dot(tl.trans(x), ds.to(keys.dtype), for_k, input_precision=PRECISION)
            for_v = tl.dot(tl.trans(y), weights.to(keys.dtype), for_v, input_precision=PRECISION)
    if INPUTS:
        if LAG > 0:
            for_k *= scale / LOG2E
        own_k = (batch * key_tokens + position)[None, :] * (kv_heads * K) + kv_head * K + dims[:, None]
        own_v = (batch * key_tokens + position)[None, :] * (kv_heads * V) + kv_head * V + values[:, None]
        tl.store(dk + own_k, for_k.to(dk.dtype.element_ty), mask=inside[None, :])
        tl.store(dv + own_v, for_v.to(dv.dtype.element_ty), mask=inside[None, :])
