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
    old_dw = tl.dot(incoming, tl.trans(old_values), input_precision=PRECISION) - shift[:, None]
    for_q = tl.zeros([C, K], tl.float32)
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
        own_values = load_rows(v, own, rows, kv_heads * V, values, key_tokens)
        dw = tl.dot(incoming, tl.trans(own_values), input_precision=PRECISION) - shift[:, None]
        ds = weights * tl.where(causal, dw, old_dw)
        sum_of_ds = tl.sum(ds, 1)
        near_part = tl.sum(weights, 1)
        near = tl.where(causal, ds, 0.0).to(x.dtype)
        for_q = tl.dot(near, own_keys, for_q, input_precision=PRECISION)
        old = tl.where(causal, 0.0, ds).to(x.dtype)
        for_q = tl.dot(old, old_keys, for_q, input_precision=PRECISION)
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
        if HAS_SINK:
            tl.store(dsink + row, for_sink, mask=inside)
        for_q *= scale / LOG2E
    if HAS_LINEAR:
        line = batch * state_heads + state_head
        at = (line * chunks + chunk) * 2
        held = values[:, None] * F + columns[None, :]
        up_norm = tl.load(norms + at * F + columns)
        down_norm = tl.load(norms + (at + 1) * F + columns)
        up_sum = tl.load(states + at * F * V + held)
        down_sum = tl.load(states + (at + 1) * F * V + held)
        if WIDE:
            from_state = incoming.to(tl.float32)
        else:
            from_state = incoming
        for_up = tl.dot(from_state, up_sum, input_precision=PRECISION)
        for_down = tl.dot(from_state, down_sum, input_precision=PRECISION)
        if HAS_CODES:
            entering = load_code(codes, batch, oldest - 1, key_tokens)
        if HAS_CARRY:
            segment = chunk // per_segment
            origin = (line * segments + segment) * 2
            alive = segment > 0
            if HAS_CODES:
                alive = alive & (load_code(codes, batch, base + segment * per_segment * C - 1, key_tokens) == entering)
            if alive:
                up_norm += tl.load(carry_norms + origin * F + columns)
                down_norm += tl.load(carry_norms + (origin + 1) * F + columns)
                turned = columns[None, :] * V + values[:, None]
                up_sum = tl.load(carries + origin * F * V + turned)
                for_up = tl.dot(from_state, up_sum, for_up, input_precision=PRECISION)
                down_sum = tl.load(carries + (origin + 1) * F * V + turned)
                for_down = tl.dot(from_state, down_sum, for_down, input_precision=PRECISION)
        for_up -= shift[:, None] * up_norm[None, :]
        for_down -= shift[:, None] * down_norm[None, :]
        if HAS_CODES:
            reader = tl.where(owner == entering, 1.0, 0.0)
            for_up *= reader[:, None]
            for_down *= reader[:, None]
        seen = causal
        if HAS_CODES:
            seen = causal & (old_code[None, :] == owner[:, None])
        far = tl.where(seen, old_dw, 0.0).to(x.dtype)
        projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
        logits = tl.dot(old_keys, projection, input_precision=PRECISION) * LOG2E
        there = oldest + rows
        exists = (there >= 0) & (there < key_tokens)
        place_of_lse = line * 2 * key_tokens + there
        up_lse = tl.load(key_lse + place_of_lse, mask=exists, other=float("inf"))
        down_lse = tl.load(key_lse + place_of_lse + key_tokens, mask=exists, other=float("inf"))
        for_up = tl.dot(far, tl.exp2(logits - up_lse[:, None]).to(x.dtype), for_up, input_precision=PRECISION)
        for_down = tl.dot(far, tl.exp2(-logits - down_lse[:, None]).to(x.dtype), for_down, input_precision=PRECISION)
        alpha = over
        if HAS_FACTOR:
            alpha *= tl.load(factor + head)
        projection = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
        logits = tl.dot(x, projection, input_precision=PRECISION) * LOG2E
        place_of_lse = (batch * heads + head) * 2 * tokens + place
        up_lse = tl.load(query_lse + place_of_lse, mask=inside, other=float("inf"))
        down_lse = tl.load(query_lse + place_of_lse + tokens, mask=inside, other=float("inf"))
        features = tl.exp2(logits - up_lse[:, None])
        for_up *= features
        past = tl.sum(for_up, 1)
        for_y = for_up - features * past[:, None]
        features = tl.exp2(-logits - down_lse[:, None])
        for_down *= features
        spread = tl.sum(for_down, 1)
        for_y = (for_y - for_down + features * spread[:, None]) * alpha[:, None]
        if LAG > 0:
            # two estimates of one number, whose errors come from the rounding of `out` in D and cancel like this
            past = (past + spread) * alpha
            tl.store(share_gradient + row, (1.0 - near_part) * sum_of_ds - near_part * past, mask=inside)
        narrow = for_y.to(x.dtype)
        if TRAIN_MAPS:
            lines = (batch * tokens + place) * heads + head
            tl.store(dy + lines[:, None] * F + columns[None, :], narrow, mask=inside[:, None])
        projection = tl.load(query_map + head * K * F + dims[None, :] * F + columns[:, None])
        for_q = tl.dot(narrow, projection, for_q, input_precision=PRECISION)
    dq += (batch * tokens * heads + head) * K
    tl.store(dq + place[:, None] * (heads * K) + dims[None, :], for_q.to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def key_window(
    keys, held, own_q, own_do, chunk, rows, dims, values, code, codes, batch, prefix, row,
    maximum, inverse, delta, share, scale, tokens, key_tokens, heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, HAS_CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, do, transposed scores with the rows' offsets in them, and dw of one key tile [C] and one chunk of queries [C]."""
    place = chunk * C + rows
    there = (place >= 0) & (place < tokens)
    x = load_rows(own_q, chunk * C, rows, heads * K, dims, tokens)
    y = load_rows(own_do, chunk * C, rows, heads * V, values, tokens)
    top = tl.load(maximum + row + place, mask=there, other=0.0)
    over = tl.load(inverse + row + place, mask=there, other=0.0)
    shift = tl.load(delta + row + place, mask=there, other=0.0)
    # a query that does not exist has log2(0)
    offset = share + tl.log2(over) - top
    scores = tl.dot(keys, tl.trans(x), input_precision=PRECISION) * scale + offset[None, :]
    if HAS_CODES:
        owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=there, other=0))
        scores = tl.where(code[:, None] == owner[None, :], scores, float("-inf"))
    dw = tl.dot(held, tl.trans(y), input_precision=PRECISION) - shift[None, :]
    return x, y, scores, dw


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
    """dk and dv of one key tile, and the gradient dy of k's projection, from every query head of the group."""
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
    mine = rows[None, :] >= rows[:, None]
    for_k = tl.zeros([C, K], tl.float32)
    for_v = tl.zeros([C, V], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        state_head = head // shared
        row = (batch * heads + head) * tokens
        own_q = q + (batch * tokens * heads + head) * K
        own_do = do + (batch * tokens * heads + head) * V
        share = 0.0
        if HAS_LINEAR and LAG > 0:
            share = tl.log2(tl.load(weight + head))
        place = i * C + rows
        there = place < tokens
        over = tl.load(inverse + row + place, mask=there, other=0.0)
        if LAG > 0:
            x, y, scores, dw = key_window(
                keys, held, own_q, own_do, i - LAG, rows, dims, values, code, codes, batch, prefix, row,
                maximum, inverse, delta, share, scale, tokens, key_tokens, heads, K, V, C, HAS_CODES, PRECISION,
            )  # fmt: skip
            far_q, far_do, far_scores, far_dw = key_window(
                keys, held, own_q, own_do, i, rows, dims, values, code, codes, batch, prefix, row,
                maximum, inverse, delta, share, scale, tokens, key_tokens, heads, K, V, C, HAS_CODES, PRECISION,
            )  # fmt: skip
            weights = tl.exp2(tl.where(mine, scores, far_scores))
            ds = weights * tl.where(mine, dw, far_dw)
            if HAS_LINEAR:
                early = (i - LAG) * C + rows
                found = (early >= 0) & (early < tokens)
                spare = tl.load(balance + row + early, mask=found, other=0.0)
                where = tl.load(place_of_top + row + early, mask=found, other=-1)
                late_spare = tl.load(balance + row + place, mask=there, other=0.0)
                late_where = tl.load(place_of_top + row + place, mask=there, other=-1)
                is_top = tl.where(mine, where[None, :], late_where[None, :]) == position[:, None]
                ds = tl.where(is_top, ds - tl.where(mine, spare[None, :], late_spare[None, :]), ds)
            for_k = tl.dot(tl.where(mine, ds, 0.0).to(keys.dtype), x, for_k, input_precision=PRECISION)
            for_k = tl.dot(tl.where(mine, 0.0, ds).to(keys.dtype), far_q, for_k, input_precision=PRECISION)
            for_v = tl.dot(tl.where(mine, weights, 0.0).to(keys.dtype), y, for_v, input_precision=PRECISION)
            mixed = tl.where(mine, 0.0, weights)
            if LAG > 1:
                for chunk in range(tl.maximum(i - LAG + 1, 0), tl.minimum(i, chunks)):
                    x, y, scores, dw = key_window(
                        keys, held, own_q, own_do, chunk, rows, dims, values, code, codes, batch, prefix, row,
                        maximum, inverse, delta, share, scale, tokens, key_tokens, heads, K, V, C, HAS_CODES, PRECISION,
                    )  # fmt: skip
                    weights = tl.exp2(scores)
                    ds = weights * dw
                    if HAS_LINEAR:
                        between = chunk * C + rows
                        found = between < tokens
                        spare = tl.load(balance + row + between, mask=found, other=0.0)
                        where = tl.load(place_of_top + row + between, mask=found, other=-1)
                        ds = tl.where(where[None, :] == position[:, None], ds - spare[None, :], ds)
                    for_k = tl.dot(ds.to(keys.dtype), x, for_k, input_precision=PRECISION)
                    for_v = tl.dot(weights.to(keys.dtype), y, for_v, input_precision=PRECISION)
        else:
            mixed = tl.zeros([C, C], tl.float32)
            far_q = load_rows(own_q, i * C, rows, heads * K, dims, tokens)
            far_do = load_rows(own_do, i * C, rows, heads * V, values, tokens)
            shift = tl.load(delta + row + place, mask=there, other=0.0)
            far_dw = tl.dot(held, tl.trans(far_do), input_precision=PRECISION) - shift[None, :]
        if HAS_LINEAR:
            line = batch * state_heads + state_head
            # no query is ahead of the keys behind the last chunk
            scanned = inside & (position < base + chunks * C)
            if HAS_CODES:
                owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=there, other=0))
                ahead = load_code(codes, batch, prefix + (i + 1) * C, key_tokens)
                reader = tl.where((code == ahead) & scanned, 1.0, 0.0)
            else:
                reader = tl.where(scanned, 1.0, 0.0)
            alpha = over
            if HAS_FACTOR:
                alpha *= tl.load(factor + head)
            offset = tl.log2(alpha)
            up_offset = offset - tl.load(query_lse + row * 2 + place, mask=there, other=0.0)
            down_offset = offset - tl.load(query_lse + row * 2 + tokens + place, mask=there, other=0.0)
            own_lse = key_lse + line * 2 * key_tokens + position
            up_lse = tl.load(own_lse, mask=scanned, other=float("inf"))
            down_lse = tl.load(own_lse + key_tokens, mask=scanned, other=float("inf"))
            projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
            key_logits = tl.dot(keys, projection, input_precision=PRECISION) * LOG2E
            turned_map = tl.load(query_map + head * K * F + dims[None, :] * F + columns[:, None])
            turned = tl.dot(turned_map, tl.trans(far_q), input_precision=PRECISION) * LOG2E
            up_k = tl.exp2(key_logits - up_lse[:, None])
            pairs = tl.dot(
                up_k.to(keys.dtype), tl.exp2(turned + up_offset[None, :]).to(keys.dtype), input_precision=PRECISION
            )
            down_k = tl.exp2(-key_logits - down_lse[:, None])
            pairs = tl.dot(
                down_k.to(keys.dtype), tl.exp2(down_offset[None, :] - turned).to(keys.dtype), pairs,
                input_precision=PRECISION,
            )  # fmt: skip
            seen = mine
            if HAS_CODES:
                seen = mine & (code[:, None] == owner[None, :])
            mixed += tl.where(seen, pairs, 0.0)
            for_v = tl.dot(mixed.to(keys.dtype), far_do, for_v, input_precision=PRECISION)
            far = tl.where(seen, far_dw, 0.0).to(keys.dtype)
            straight = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
            logits = tl.dot(far_q, straight, input_precision=PRECISION) * LOG2E
            for_up = tl.dot(far, tl.exp2(logits + up_offset[:, None]).to(keys.dtype), input_precision=PRECISION)
            for_down = tl.dot(far, tl.exp2(down_offset[:, None] - logits).to(keys.dtype), input_precision=PRECISION)
            if (shared == 1) or (member == 0):
                last = tl.minimum(i, chunks - 1)
                at = (line * chunks + last) * 2
                if WIDE:
                    read_up, read_down = up_k * reader[:, None], down_k * reader[:, None]
                    read_v = held.to(tl.float32) * reader[:, None]
                else:
                    read_up, read_down = (up_k * reader[:, None]).to(keys.dtype), (down_k * reader[:, None]).to(keys.dtype)
                    if HAS_CODES:
                        read_v = (held.to(tl.float32) * reader[:, None]).to(keys.dtype)
                    else:
                        read_v = held
                place_of_sum = values[:, None] * F + columns[None, :]
                up_norm = tl.load(norms + at * F + columns)
                down_norm = tl.load(norms + (at + 1) * F + columns)
                up_sum = tl.load(states + at * F * V + place_of_sum)
                for_v = tl.dot(read_up, tl.trans(up_sum), for_v, input_precision=PRECISION)
                for_up = tl.dot(read_v, up_sum, for_up, input_precision=PRECISION)
                down_sum = tl.load(states + (at + 1) * F * V + place_of_sum)
                for_v = tl.dot(read_down, tl.trans(down_sum), for_v, input_precision=PRECISION)
                for_down = tl.dot(read_v, down_sum, for_down, input_precision=PRECISION)
                if HAS_CARRY:
                    segment = last // per_segment
                    same = segment < segments - 1
                    if HAS_CODES:
                        behind = load_code(codes, batch, prefix + (segment + 1) * per_segment * C, key_tokens)
                        same = same & (ahead == behind)
                    if same:
                        origin = (line * segments + segment) * 2
                        square = columns[:, None] * V + values[None, :]
                        up_norm += tl.load(carry_norms + origin * F + columns)
                        down_norm += tl.load(carry_norms + (origin + 1) * F + columns)
                        up_sum = tl.load(carries + origin * F * V + square)
                        for_v = tl.dot(read_up, up_sum, for_v, input_precision=PRECISION)
                        for_up = tl.dot(read_v, tl.trans(up_sum), for_up, input_precision=PRECISION)
                        down_sum = tl.load(carries + (origin + 1) * F * V + square)
                        for_v = tl.dot(read_down, down_sum, for_v, input_precision=PRECISION)
                        for_down = tl.dot(read_v, tl.trans(down_sum), for_down, input_precision=PRECISION)
                for_up += reader[:, None] * up_norm[None, :]
                for_down += reader[:, None] * down_norm[None, :]
            for_up *= up_k
            for_y = for_up - up_k * tl.sum(for_up, 1)[:, None]
            for_down *= down_k
            for_y = for_y - for_down + down_k * tl.sum(for_down, 1)[:, None]
            narrow = for_y.to(keys.dtype)
            if TRAIN_MAPS:
                to = ((batch * key_tokens + position) * heads + head)[:, None] * F + columns[None, :]
                tl.store(dy + to, narrow, mask=inside[:, None])
            projection = tl.load(key_map + state_head * K * F + dims[None, :] * F + columns[:, None])
            if LAG > 0:
                narrow = (for_y * (LOG2E / scale)).to(keys.dtype)
            for_k = tl.dot(narrow, projection, for_k, input_precision=PRECISION)
        elif LAG > 0:
            for_v = tl.dot(mixed.to(keys.dtype), far_do, for_v, input_precision=PRECISION)
    if LAG > 0:
        for_k *= scale / LOG2E
    own_k = (batch * key_tokens + position)[:, None] * (kv_heads * K) + kv_head * K + dims[None, :]
    own_v = (batch * key_tokens + position)[:, None] * (kv_heads * V) + kv_head * V + values[None, :]
    tl.store(dk + own_k, for_k.to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv + own_v, for_v.to(dv.dtype.element_ty), mask=inside[:, None])
