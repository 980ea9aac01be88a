"""Gradients of window_linear where the window is a whole number of chunks; geometry as in `triton_aligned_forward`.

With p_tj the weights divided by their row's sum, D_t = do_t . o_t and dw_tj = do_t . v_j - D_t, the window's scores get
ds = p dw, and the largest of a row also what keeps the row's sum at zero (see `triton_backward`). One sum is the other: dw of
the oldest tile serves the window in one triangle and the features in the other. Sums of weights, shares and factors go into
exponents, so neither a maximum nor a sum of features is looked for again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_aligned_forward import load_codes
from linearize.kernels.window_linear.triton_common import LOG2E, document, load_code, load_rows


@triton.jit
def aligned_query_gradient_kernel(
    q, k, v, out, do, query_map, key_map, weight, factor, sink, codes, key_lse, query_lse,
    states, norms, carries, carry_norms, maximum, inverse,
    dq, dy, delta, balance, share_gradient, place_of_top, dsink,
    tokens, key_tokens, prefix, base, chunks, per_segment, segments, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr,
    HAS_LINEAR: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CODES: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, TRAIN_MAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, the gradient dy of q's projection, and per row: D, the sum of the window's ds, where its maximum is."""
    chunk = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    state_head = head // (heads // state_heads)
    q += (batch * tokens * heads + head) * K
    out += (batch * tokens * heads + head) * V
    do += (batch * tokens * heads + head) * V
    k += (batch * key_tokens * kv_heads + kv_head) * K
    v += (batch * key_tokens * kv_heads + kv_head) * V
    rows, dims, values, columns = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V), tl.arange(0, F)
    place = chunk * C + rows
    inside = place < tokens
    oldest = base + chunk * C
    own = oldest + LAG * C
    causal = rows[None, :] <= rows[:, None]
    row = (batch * heads + head) * tokens + place
    x = load_rows(q, chunk * C, rows, heads * K, dims, tokens)
    incoming = load_rows(do, chunk * C, rows, heads * V, values, tokens)
    answer = load_rows(out, chunk * C, rows, heads * V, values, tokens)
    shift = tl.sum(incoming.to(tl.float32) * answer.to(tl.float32), 1)
    tl.store(delta + row, shift, mask=inside)
    over = tl.load(inverse + row, mask=inside, other=0.0)
    old_keys = load_rows(k, oldest, rows, kv_heads * K, dims, key_tokens)
    old_values = load_rows(v, oldest, rows, kv_heads * V, values, key_tokens)
    owner = tl.zeros([C], tl.int32)
    if HAS_CODES:
        owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=inside, other=0))
        old_code = load_codes(codes, batch, oldest + rows, key_tokens)
    for_q = tl.zeros([C, K], tl.float32)
    past = tl.zeros([C], tl.float32)
    if HAS_LINEAR:
        line = batch * state_heads + state_head
        at = (line * chunks + chunk) * 2
        held = values[:, None] * F + columns[None, :]
        dw = tl.dot(incoming, tl.trans(old_values), input_precision=PRECISION) - shift[:, None]
        seen = causal
        alive = False
        origin = at
        reader = tl.full([C], 1.0, tl.float32)
        if HAS_CODES:
            seen = causal & (old_code[None, :] == owner[:, None])
            entering = load_code(codes, batch, oldest - 1, key_tokens)
            reader = tl.where(owner == entering, 1.0, 0.0)
        if HAS_CARRY:
            segment = chunk // per_segment
            origin = (line * segments + segment) * 2
            alive = segment > 0
            if HAS_CODES:
                alive = alive & (load_code(codes, batch, base + segment * per_segment * C - 1, key_tokens) == entering)
        far = tl.where(seen, dw, 0.0).to(x.dtype)
        key_projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
        projection = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
        there = oldest + rows
        exists = (there >= 0) & (there < key_tokens)
        own_lse = key_lse + line * 2 * key_tokens + there
        query_line = query_lse + (batch * heads + head) * 2 * tokens + place
        if WIDE:
            from_state = incoming.to(tl.float32)
        else:
            from_state = incoming
        alpha = over
        if HAS_FACTOR:
            alpha *= tl.load(factor + head)
        for_y = tl.zeros([C, F], tl.float32)
        # softmax(y), then softmax(-y), each from its own projection: a product costs less than holding the first one's
        for half in range(2):
            sign = 1.0 - 2.0 * half
            norm = tl.load(norms + (at + half) * F + columns)
            sums = tl.load(states + (at + half) * F * V + held)
            if HAS_CARRY:
                norm += tl.load(carry_norms + (origin + half) * F + columns, mask=(columns < F) & alive, other=0.0)
                sums += tl.load(carries + (origin + half) * F * V + held, mask=(columns < F)[None, :] & alive, other=0.0)
            for_phi = tl.dot(from_state, sums, input_precision=PRECISION)
            for_phi -= shift[:, None] * norm[None, :]
            if HAS_CODES:
                for_phi *= reader[:, None]
            lse = tl.load(own_lse + half * key_tokens, mask=exists, other=float("inf"))
            key_logits = tl.dot(old_keys, key_projection, input_precision=PRECISION)
            phi_k = tl.exp2(key_logits * (sign * LOG2E) - lse[:, None]).to(x.dtype)
            for_phi = tl.dot(far, phi_k, for_phi, input_precision=PRECISION)
            lse = tl.load(query_line + half * tokens, mask=inside, other=float("inf"))
            logits = tl.dot(x, projection, input_precision=PRECISION)
            phi = tl.exp2(logits * (sign * LOG2E) - lse[:, None])
            for_phi *= phi
            spread = tl.sum(for_phi, 1)
            past += spread
            for_y += sign * (for_phi - phi * spread[:, None])
        past *= alpha
        for_y *= alpha[:, None]
        if TRAIN_MAPS:
            lines = (batch * tokens + place) * heads + head
            tl.store(dy + lines[:, None] * F + columns[None, :], for_y.to(dy.dtype.element_ty), mask=inside[:, None])
        if LAG > 0:
            # in units of the scores' gradient, to which the window adds
            for_y *= LOG2E / scale
        for_q = tl.dot(for_y.to(x.dtype), tl.trans(projection), for_q, input_precision=PRECISION)
    if LAG > 0:
        own_keys = load_rows(k, own, rows, kv_heads * K, dims, key_tokens)
        scores = tl.dot(x, tl.trans(own_keys), input_precision=PRECISION)
        old_scores = tl.dot(x, tl.trans(old_keys), input_precision=PRECISION)
        scores = tl.where(causal, scores, old_scores) * scale
        if HAS_CODES:
            own_code = load_codes(codes, batch, own + rows, key_tokens)
            seen = tl.where(causal, own_code[None, :], old_code[None, :]) == owner[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        else:
            scores = tl.where(causal | (oldest >= 0), scores, float("-inf"))
        best = tl.max(scores, 1)
        best_place = tl.where(causal, own + rows[None, :], oldest + rows[None, :])
        best_place = tl.min(tl.where(scores == best[:, None], best_place, 2147483647), 1)
        top = tl.load(maximum + row, mask=inside, other=0.0)
        share = 0.0
        if HAS_LINEAR:
            share = tl.log2(tl.load(weight + head))
        offset = share + tl.log2(over) - top
        weights = tl.exp2(scores + offset[:, None])
        near_part = tl.sum(weights, 1)
        own_values = load_rows(v, own, rows, kv_heads * V, values, key_tokens)
        dw = tl.dot(incoming, tl.trans(own_values), input_precision=PRECISION)
        old_dw = tl.dot(incoming, tl.trans(old_values), input_precision=PRECISION)
        ds = weights * (tl.where(causal, dw, old_dw) - shift[:, None])
        sum_of_ds = tl.sum(ds, 1)
        for_q = tl.dot(tl.where(causal, ds, 0.0).to(x.dtype), own_keys, for_q, input_precision=PRECISION)
        for_q = tl.dot(tl.where(causal, 0.0, ds).to(x.dtype), old_keys, for_q, input_precision=PRECISION)
        if LAG > 1:
            for i in range(1, LAG):
                middle = oldest + i * C
                keys = load_rows(k, middle, rows, kv_heads * K, dims, key_tokens)
                between = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * scale
                if HAS_CODES:
                    code = load_codes(codes, batch, middle + rows, key_tokens)
                    between = tl.where(code[None, :] == owner[:, None], between, float("-inf"))
                else:
                    between = tl.where(middle >= 0, between, float("-inf"))
                higher = tl.max(between, 1)
                found = tl.min(tl.where(between == higher[:, None], middle + rows[None, :], 2147483647), 1)
                best_place = tl.where(higher > best, found, best_place)
                best = tl.maximum(best, higher)
                weights = tl.exp2(between + offset[:, None])
                y = load_rows(v, middle, rows, kv_heads * V, values, key_tokens)
                ds = weights * (tl.dot(incoming, tl.trans(y), input_precision=PRECISION) - shift[:, None])
                sum_of_ds += tl.sum(ds, 1)
                near_part += tl.sum(weights, 1)
                for_q = tl.dot(ds.to(x.dtype), keys, for_q, input_precision=PRECISION)
        for_sink = tl.zeros([C], tl.float32)
        if HAS_SINK:
            logit = tl.load(sink + head) * LOG2E
            weights_of_sink = tl.exp2(logit + offset)
            near_part += weights_of_sink
            for_sink = -weights_of_sink * shift
            sum_of_ds += for_sink
            best_place = tl.where(best > logit, best_place, -1)
            best = tl.maximum(best, logit)
        best_place = tl.where(best == float("-inf"), -1, best_place)
        if HAS_LINEAR:
            there = (best_place >= 0) & inside
            keys = tl.load(
                k + best_place.to(tl.int64)[:, None] * (kv_heads * K) + dims[None, :], mask=there[:, None], other=0.0
            )
            for_q -= sum_of_ds[:, None] * keys.to(tl.float32)
            tl.store(balance + row, sum_of_ds, mask=inside)
            tl.store(place_of_top + row, best_place, mask=inside)
            for_sink = tl.where(best_place < 0, for_sink - sum_of_ds, for_sink)
            # two estimates of one number, whose errors come from the rounding of `out` in D and cancel like this
            tl.store(share_gradient + row, (1.0 - near_part) * sum_of_ds - near_part * past, mask=inside)
        if HAS_SINK:
            tl.store(dsink + row, for_sink, mask=inside)
        for_q *= scale / LOG2E
    dq += (batch * tokens * heads + head) * K
    tl.store(dq + place[:, None] * (heads * K) + dims[None, :], for_q.to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def scores_of_chunk(
    keys, held, own_q, own_do, chunk, rows, dims, values, code, codes, batch, prefix, row,
    maximum, inverse, delta, share, scale, tokens, key_tokens, heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, HAS_CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, do, scores with the rows' offsets in them, and dw of one chunk of queries [C] and one tile of keys [C]."""
    place = chunk * C + rows
    there = (place >= 0) & (place < tokens)
    x = load_rows(own_q, chunk * C, rows, heads * K, dims, tokens)
    y = load_rows(own_do, chunk * C, rows, heads * V, values, tokens)
    top = tl.load(maximum + row + place, mask=there, other=0.0)
    over = tl.load(inverse + row + place, mask=there, other=0.0)
    shift = tl.load(delta + row + place, mask=there, other=0.0)
    # a query that does not exist has log2(0)
    offset = share + tl.log2(over) - top
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
    q, k, v, do, query_map, key_map, weight, factor, codes, key_lse, query_lse,
    states, norms, carries, carry_norms, maximum, inverse, delta, balance, place_of_top,
    dk, dv, dy,
    tokens, key_tokens, prefix, base, chunks, per_segment, segments, first, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr,
    HAS_LINEAR: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_CODES: tl.constexpr, HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, TRAIN_MAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile, and the gradient dy of k's projection, from every query head of the group.

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
    # in the own chunk a query sees a key of the window here, in the chunk a window later it has it behind
    mine = rows[:, None] >= rows[None, :]
    for_k = tl.zeros([K, C], tl.float32)
    for_v = tl.zeros([V, C], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        state_head = head // shared
        row = (batch * heads + head) * tokens
        own_q = q + (batch * tokens * heads + head) * K
        own_do = do + (batch * tokens * heads + head) * V
        mixed = tl.zeros([C, C], keys.dtype)
        if HAS_LINEAR:
            line = batch * state_heads + state_head
            place = i * C + rows
            there = place < tokens
            # no query is ahead of the keys behind the last chunk
            scanned = inside & (position < base + chunks * C)
            last = tl.minimum(i, chunks - 1)
            at = (line * chunks + last) * 2
            origin = at
            same = False
            reader = tl.where(scanned, 1.0, 0.0)
            seen = mine
            if HAS_CODES:
                owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=there, other=0))
                ahead = load_code(codes, batch, prefix + (i + 1) * C, key_tokens)
                reader = tl.where((code == ahead) & scanned, 1.0, 0.0)
                seen = mine & (code[None, :] == owner[:, None])
            if HAS_CARRY:
                segment = last // per_segment
                origin = (line * segments + segment) * 2
                same = segment < segments - 1
                if HAS_CODES:
                    behind = load_code(codes, batch, prefix + (segment + 1) * per_segment * C, key_tokens)
                    same = same & (ahead == behind)
            alpha = tl.load(inverse + row + place, mask=there, other=0.0)
            if HAS_FACTOR:
                alpha *= tl.load(factor + head)
            offset = tl.log2(alpha)
            own_lse = key_lse + line * 2 * key_tokens + position
            query_line = query_lse + row * 2 + place
            far_q = load_rows(own_q, i * C, rows, heads * K, dims, tokens)
            far_do = load_rows(own_do, i * C, rows, heads * V, values, tokens)
            shift = tl.load(delta + row + place, mask=there, other=0.0)
            dw = tl.dot(far_do, tl.trans(held), input_precision=PRECISION) - shift[:, None]
            far = tl.where(seen, dw, 0.0).to(keys.dtype)
            projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
            query_projection = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
            pairs = tl.zeros([C, C], tl.float32)
            for_y = tl.zeros([F, C], tl.float32)
            place_of_sum = values[:, None] * F + columns[None, :]
            # features are made once for each use: holding them costs more registers than there are
            for half in range(2):
                sign = LOG2E - 2.0 * LOG2E * half
                lse = tl.load(own_lse + half * key_tokens, mask=scanned, other=float("inf"))
                key_logits = tl.dot(tl.trans(projection), tl.trans(keys), input_precision=PRECISION)
                phi_k = tl.exp2(key_logits * sign - lse[None, :]).to(keys.dtype)
                lse = offset - tl.load(query_line + half * tokens, mask=there, other=0.0)
                logits = tl.dot(far_q, query_projection, input_precision=PRECISION)
                phi = tl.exp2(logits * sign + lse[:, None]).to(keys.dtype)
                pairs = tl.dot(phi, phi_k, pairs, input_precision=PRECISION)
                if (shared == 1) or (member == 0):
                    read_k = phi_k
                    if HAS_CODES:
                        read_k = (read_k.to(tl.float32) * reader[None, :]).to(keys.dtype)
                    if WIDE:
                        read_k = read_k.to(tl.float32)
                    sums = tl.load(states + (at + half) * F * V + place_of_sum)
                    if HAS_CARRY:
                        carry = carries + (origin + half) * F * V + place_of_sum
                        sums += tl.load(carry, mask=(columns < F)[None, :] & same, other=0.0)
                    for_v = tl.dot(sums, read_k, for_v, input_precision=PRECISION)
            mixed = tl.where(seen, pairs, 0.0).to(keys.dtype)
            for half in range(2):
                sign = LOG2E - 2.0 * LOG2E * half
                lse = offset - tl.load(query_line + half * tokens, mask=there, other=0.0)
                logits = tl.dot(tl.trans(query_projection), tl.trans(far_q), input_precision=PRECISION)
                phi = tl.exp2(logits * sign + lse[None, :]).to(keys.dtype)
                for_phi = tl.dot(phi, far, input_precision=PRECISION)
                lse = tl.load(own_lse + half * key_tokens, mask=scanned, other=float("inf"))
                key_logits = tl.dot(tl.trans(projection), tl.trans(keys), input_precision=PRECISION)
                phi_k = tl.exp2(key_logits * sign - lse[None, :])
                if (shared == 1) or (member == 0):
                    read_v = held
                    if HAS_CODES:
                        read_v = (held.to(tl.float32) * reader[:, None]).to(keys.dtype)
                    if WIDE:
                        read_v = read_v.to(tl.float32)
                    norm = tl.load(norms + (at + half) * F + columns)
                    sums = tl.load(states + (at + half) * F * V + place_of_sum)
                    if HAS_CARRY:
                        from_carry = (columns < F) & same
                        norm += tl.load(carry_norms + (origin + half) * F + columns, mask=from_carry, other=0.0)
                        carry = carries + (origin + half) * F * V + place_of_sum
                        sums += tl.load(carry, mask=from_carry[None, :], other=0.0)
                    for_phi = tl.dot(tl.trans(sums), tl.trans(read_v), for_phi, input_precision=PRECISION)
                    for_phi += norm[:, None] * reader[None, :]
                for_phi *= phi_k
                spread = tl.sum(for_phi, 0)
                for_y += (1.0 - 2.0 * half) * (for_phi - phi_k * spread[None, :])
            if TRAIN_MAPS:
                to = ((batch * key_tokens + position) * heads + head)[None, :] * F + columns[:, None]
                tl.store(dy + to, for_y.to(dy.dtype.element_ty), mask=inside[None, :])
            if LAG > 0:
                # in units of the scores' gradient, to which the window adds
                for_y *= LOG2E / scale
            for_k = tl.dot(projection, for_y.to(keys.dtype), for_k, input_precision=PRECISION)
            if LAG == 0:
                for_v = tl.dot(tl.trans(far_do), mixed, for_v, input_precision=PRECISION)
        if LAG > 0:
            share = 0.0
            if HAS_LINEAR:
                share = tl.log2(tl.load(weight + head))
            x, y, scores, dw = scores_of_chunk(
                keys, held, own_q, own_do, i - LAG, rows, dims, values, code, codes, batch, prefix, row,
                maximum, inverse, delta, share, scale, tokens, key_tokens, heads, K, V, C, HAS_CODES, PRECISION,
            )  # fmt: skip
            weights = tl.where(mine, tl.exp2(scores), 0.0)
            ds = weights * dw
            if HAS_LINEAR:
                ds = without_spare(ds, balance, place_of_top, row, i - LAG, rows, position, tokens, C)
            for_k = tl.dot(tl.trans(x), tl.where(mine, ds, 0.0).to(keys.dtype), for_k, input_precision=PRECISION)
            for_v = tl.dot(tl.trans(y), weights.to(keys.dtype), for_v, input_precision=PRECISION)
            if LAG > 1:
                for chunk in range(tl.maximum(i - LAG + 1, 0), tl.minimum(i, chunks)):
                    x, y, scores, dw = scores_of_chunk(
                        keys, held, own_q, own_do, chunk, rows, dims, values, code, codes, batch, prefix, row,
                        maximum, inverse, delta, share, scale, tokens, key_tokens, heads, K, V, C, HAS_CODES, PRECISION,
                    )  # fmt: skip
                    weights = tl.exp2(scores)
                    ds = weights * dw
                    if HAS_LINEAR:
                        ds = without_spare(ds, balance, place_of_top, row, chunk, rows, position, tokens, C)
                    for_k = tl.dot(tl.trans(x), ds.to(keys.dtype), for_k, input_precision=PRECISION)
                    for_v = tl.dot(tl.trans(y), weights.to(keys.dtype), for_v, input_precision=PRECISION)
            x, y, scores, dw = scores_of_chunk(
                keys, held, own_q, own_do, i, rows, dims, values, code, codes, batch, prefix, row,
                maximum, inverse, delta, share, scale, tokens, key_tokens, heads, K, V, C, HAS_CODES, PRECISION,
            )  # fmt: skip
            weights = tl.exp2(scores)
            ds = weights * dw
            if HAS_LINEAR:
                ds = without_spare(ds, balance, place_of_top, row, i, rows, position, tokens, C)
            for_k = tl.dot(tl.trans(x), tl.where(mine, 0.0, ds).to(keys.dtype), for_k, input_precision=PRECISION)
            # one of the two is zero
            mixed = mixed + tl.where(mine, 0.0, weights).to(keys.dtype)
            for_v = tl.dot(tl.trans(y), mixed, for_v, input_precision=PRECISION)
    if LAG > 0:
        for_k *= scale / LOG2E
    own_k = (batch * key_tokens + position)[None, :] * (kv_heads * K) + kv_head * K + dims[:, None]
    own_v = (batch * key_tokens + position)[None, :] * (kv_heads * V) + kv_head * V + values[:, None]
    tl.store(dk + own_k, for_k.to(dk.dtype.element_ty), mask=inside[None, :])
    tl.store(dv + own_v, for_v.to(dv.dtype.element_ty), mask=inside[None, :])
