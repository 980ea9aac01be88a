"""Gradients of window_linear, chunk by chunk: one kernel for the queries' side, one for the keys'.

With g = do / den and delta = (do . o) / den every weight w_tj, of the window or of the past, has dw_tj = g_t.v_j -
delta_t (o = sum w v / sum w). The window's scores get ds = w dw, and its largest one also what keeps their sum at zero:
the row maximum is part of the function (the past is not divided by its exponential), so its gradient is not dropped.
That sum is -phi(q).dphi(q), which the query kernel writes for the key kernel, with the place of the maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_common import (
    LOG2E,
    column_softmax,
    document,
    load_code,
    load_columns,
    load_rows,
    maps_backward,
    row_maps,
    row_softmax,
)
from linearize.kernels.window_linear.triton_pins import (
    BEHIND,
    pinned_gradient,
    pinned_rows,
    pinned_to_queries,
)


@triton.jit
def query_gradient_kernel(
    q, k, v, out, do, query_map, key_map, weight, factor, sink, codes, past_codes, pin, asking, reach,
    states, norms, carries, carry_norms, maximum, log_inverse,
    dq, dasking, pin_weights, pin_ds, dy, delta, balance, share_gradient, place_of_top, dsink,
    tokens, key_tokens, prefix, base, chunks, window, per_segment, segments, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    TILES: tl.constexpr, LINEAR_TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_CODES: tl.constexpr, HAS_REACH: tl.constexpr, HAS_CARRY: tl.constexpr, WIDE: tl.constexpr,
    TRAIN_MAPS: tl.constexpr, PRECISION: tl.constexpr, PINS: tl.constexpr, HAS_ASKING: tl.constexpr,
):  # fmt: skip
    """dq, the gradient dy of q's projection, and per row: delta, the sum of the window's ds, where its maximum is."""
    chunk = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    state_head = head // (heads // state_heads)
    q += (batch * tokens * heads + head) * K
    k += (batch * key_tokens * kv_heads + kv_head) * K
    v += (batch * key_tokens * kv_heads + kv_head) * V
    rows, dims, values = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    place = chunk * C + rows
    inside = place < tokens
    mine = prefix + place
    lines = (batch * tokens + place) * heads + head
    row = (batch * heads + head) * tokens + place
    x = load_rows(q, chunk * C, rows, heads * K, dims, tokens)
    square = lines[:, None] * V + values[None, :]
    incoming = tl.load(do + square, mask=inside[:, None], other=0.0)
    over = tl.exp2(tl.load(log_inverse + row, mask=inside, other=float("-inf")))
    answer = tl.load(out + square, mask=inside[:, None], other=0.0)
    shift = tl.sum(incoming.to(tl.float32) * answer.to(tl.float32), 1)
    tl.store(delta + row, shift, mask=inside)
    drop = shift
    shift *= over
    g = (incoming.to(tl.float32) * over[:, None]).to(x.dtype)
    far = tl.zeros([C], tl.int32) + window
    if HAS_REACH:
        far = tl.load(reach + batch * tokens + place, mask=inside, other=0)
    owner = tl.zeros([C], tl.int32)
    if HAS_CODES:
        owner = document(tl.load(codes + batch * key_tokens + mine, mask=inside, other=0))
    for_q = tl.zeros([C, K], tl.float32)
    first_tile = tl.maximum(chunk, -base // C)
    share = 1.0
    if HAS_WINDOW:
        share = tl.load(weight + head)
        top = tl.load(maximum + row, mask=inside, other=0.0)
        sum_of_ds = tl.zeros([C], tl.float32)
        near_part = tl.zeros([C], tl.float32)
        best = tl.full([C], float("-inf"), tl.float32)
        best_place = tl.full([C], -1, tl.int32)
        if PINS > 0:
            pinned = tl.load(pin + batch * tokens + place, mask=inside, other=BEHIND)
            asking += (batch * tokens * heads + head) * K
            asks = load_rows(asking, chunk * C, rows, heads * K, dims, tokens)
            pin_row = (batch * heads + head) * PINS * tokens + place
            best, best_place, pin_part, sum_of_ds = pinned_gradient(
                asks, incoming, k, v, codes, batch, pinned, mine - far, owner, tl.log2(share * over) - top * LOG2E,
                drop, pin_row, inside, pin_weights, pin_ds, scale * LOG2E, tokens, key_tokens, dims, values,
                kv_heads * K, kv_heads * V, PINS, True,
            )  # fmt: skip
            best /= LOG2E
        if HAS_SINK:
            logit = tl.load(sink + head)
            best_place = tl.where(best > logit, best_place, -1)
            best = tl.maximum(best, logit)
            weight_of_sink = share * tl.exp2((logit - top) * LOG2E)
            near_part += weight_of_sink
            for_sink = -weight_of_sink * shift
            sum_of_ds += for_sink
        for i in range(first_tile, chunk + TILES):
            here = base + i * C
            other = here + rows
            keys = load_columns(k, here, rows, kv_heads * K, dims, key_tokens)
            scores = tl.dot(x, keys, input_precision=PRECISION)
            age = mine[:, None] - other[None, :]
            seen = (age >= 0) & (age < far[:, None]) & (other >= 0)[None, :] & (other < key_tokens)[None, :]
            if HAS_CODES:
                code = tl.load(
                    codes + batch * key_tokens + other, mask=(other >= 0) & (other < key_tokens), other=-1
                )
                seen = seen & (code[None, :] == owner[:, None])
            scores = tl.where(seen, scores * scale, float("-inf"))
            higher = tl.max(scores, 1)
            where = tl.argmax(scores, 1) + here
            best_place = tl.where(higher > best, where, best_place)
            best = tl.maximum(best, higher)
            weights = tl.exp2((scores - top[:, None]) * LOG2E) * share
            opposite = load_columns(v, here, rows, kv_heads * V, values, key_tokens)
            ds = weights * (tl.dot(g, opposite, input_precision=PRECISION) - shift[:, None])
            sum_of_ds += tl.sum(ds, 1)
            near_part += tl.sum(weights, 1)
            keys = load_rows(k, here, rows, kv_heads * K, dims, key_tokens)
            for_q = tl.dot(ds.to(x.dtype), keys, for_q, input_precision=PRECISION)
    columns = tl.arange(0, F)
    key_projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
    for_up = tl.zeros([C, F], tl.float32)
    for_down = tl.zeros([C, F], tl.float32)
    for i in range(first_tile, chunk + LINEAR_TILES):
        here = base + i * C
        other = here + rows
        keys = load_rows(k, here, rows, kv_heads * K, dims, key_tokens)
        up_k, down_k, _, _ = row_maps(tl.dot(keys, key_projection, input_precision=PRECISION))
        age = mine[:, None] - other[None, :]
        seen = (age >= far[:, None]) & (other >= 0)[None, :] & (other < key_tokens)[None, :]
        if HAS_CODES:
            code = tl.load(
                past_codes + batch * key_tokens + other, mask=(other >= 0) & (other < key_tokens), other=-1
            )
            seen = seen & (code[None, :] == owner[:, None])
        opposite = load_columns(v, here, rows, kv_heads * V, values, key_tokens)
        dw = tl.dot(g, opposite, input_precision=PRECISION) - shift[:, None]
        dw = tl.where(seen, dw, 0.0).to(x.dtype)
        for_up = tl.dot(dw, up_k.to(x.dtype), for_up, input_precision=PRECISION)
        for_down = tl.dot(dw, down_k.to(x.dtype), for_down, input_precision=PRECISION)
    line = batch * state_heads + state_head
    at = (line * chunks + chunk) * 2
    up_norm = tl.load(norms + at * F + columns)
    down_norm = tl.load(norms + (at + 1) * F + columns)
    held = columns[None, :] + values[:, None] * F
    up_sum = tl.load(states + at * F * V + held)
    down_sum = tl.load(states + (at + 1) * F * V + held)
    reader = tl.full([C], 1.0, tl.float32)
    if HAS_CODES:
        entering = load_code(codes, batch, base + chunk * C - 1, key_tokens)
        reader = tl.where(owner == entering, 1.0, 0.0)
    from_state = g.to(tl.float32) * reader[:, None]
    from_state = from_state if WIDE else from_state.to(x.dtype)
    for_up = tl.dot(from_state, up_sum, for_up, input_precision=PRECISION)
    for_down = tl.dot(from_state, down_sum, for_down, input_precision=PRECISION)
    if HAS_CARRY:
        segment = chunk // per_segment
        origin = (line * segments + segment) * 2
        alive = segment > 0
        if HAS_CODES:
            start = load_code(codes, batch, base + segment * per_segment * C - 1, key_tokens)
            alive = alive & (start == entering)
        if alive:
            up_norm += tl.load(carry_norms + origin * F + columns)
            down_norm += tl.load(carry_norms + (origin + 1) * F + columns)
            up_sum = tl.load(carries + origin * F * V + held)
            down_sum = tl.load(carries + (origin + 1) * F * V + held)
            for_up = tl.dot(from_state, up_sum, for_up, input_precision=PRECISION)
            for_down = tl.dot(from_state, down_sum, for_down, input_precision=PRECISION)
    lost = (shift * reader)[:, None]
    for_up -= lost * up_norm[None, :]
    for_down -= lost * down_norm[None, :]
    if HAS_FACTOR:
        for_up *= tl.load(factor + head)
        for_down *= tl.load(factor + head)
    projection = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
    up, down, _, _ = row_maps(tl.dot(x, projection, input_precision=PRECISION))
    if HAS_WINDOW:
        # two estimates of one number, whose errors come from the rounding of `out` in delta and cancel like this
        past = tl.sum(up * for_up, 1) + tl.sum(down * for_down, 1)
        near_part *= over
        if PINS > 0:
            near_part += pin_part
        tl.store(share_gradient + row, (1.0 - near_part) * sum_of_ds - near_part * past, mask=inside)
        tl.store(balance + row, sum_of_ds, mask=inside)
        tl.store(place_of_top + row, best_place, mask=inside)
        if PINS == 0:
            keys = pinned_rows(k, best_place, (best_place >= 0) & inside, kv_heads * K, dims)
            for_q -= sum_of_ds[:, None] * keys
        for_q *= scale
        if HAS_SINK:
            tl.store(dsink + row, tl.where(best_place == -1, for_sink - sum_of_ds, for_sink), mask=inside)
    for_y = maps_backward(up, down, for_up, for_down).to(x.dtype)
    if TRAIN_MAPS:
        tl.store(dy + lines[:, None] * F + columns[None, :], for_y, mask=inside[:, None])
    projection = tl.load(query_map + head * K * F + dims[None, :] * F + columns[:, None])
    for_q = tl.dot(for_y, projection, for_q, input_precision=PRECISION)
    if PINS > 0:
        for_q = pinned_to_queries(
            k, codes, batch, pinned, mine - far, owner, for_q, sum_of_ds, best_place, pin_row, inside, pin_ds,
            dasking + lines * K, scale, tokens, key_tokens, dims, kv_heads * K, PINS, HAS_ASKING,
        )  # fmt: skip
    tl.store(dq + lines[:, None] * K + dims[None, :], for_q.to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def key_gradient_kernel(
    q, k, v, do, query_map, key_map, weight, factor, codes, past_codes, reach,
    states, norms, carries, carry_norms, maximum, log_inverse, delta, balance, place_of_top,
    dk, dv, dy,
    tokens, key_tokens, prefix, base, chunks, window, per_segment, segments, first, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    TILES: tl.constexpr, LINEAR_TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_CODES: tl.constexpr,
    HAS_REACH: tl.constexpr, HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, TRAIN_MAPS: tl.constexpr,
    DO_WINDOW: tl.constexpr, DO_LINEAR: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile, and the gradient dy of k's projection, from every query head of the group.

    DO_WINDOW and DO_LINEAR split the work where one kernel needs too many registers; ADD adds to what the first wrote.
    """
    i = first + tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    group: tl.constexpr = heads // kv_heads
    k += (batch * key_tokens * kv_heads + kv_head) * K
    v += (batch * key_tokens * kv_heads + kv_head) * V
    rows, dims, values = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    columns = tl.arange(0, F)
    here = base + i * C
    mine = here + rows
    inside = (mine >= 0) & (mine < key_tokens)
    keys = load_rows(k, here, rows, kv_heads * K, dims, key_tokens)
    held = load_rows(v, here, rows, kv_heads * V, values, key_tokens)
    code = tl.zeros([C], tl.int32)
    if HAS_CODES:
        code = tl.load(codes + batch * key_tokens + mine, mask=inside, other=-1)
        past_code = tl.load(past_codes + batch * key_tokens + mine, mask=inside, other=-1)
    own_k = (batch * key_tokens + mine)[:, None] * (kv_heads * K) + kv_head * K + dims[None, :]
    own_v = (batch * key_tokens + mine)[:, None] * (kv_heads * V) + kv_head * V + values[None, :]
    if ADD:
        for_k = tl.load(dk + own_k, mask=inside[:, None], other=0.0).to(tl.float32)
        for_v = tl.load(dv + own_v, mask=inside[:, None], other=0.0).to(tl.float32)
    else:
        for_k = tl.zeros([C, K], tl.float32)
        for_v = tl.zeros([C, V], tl.float32)
    first_chunk = tl.maximum(i - TILES + 1, 0)
    last_chunk = tl.minimum(i, chunks - 1)
    for member in range(group):
        head = kv_head * group + member
        state_head = head // (heads // state_heads)
        own_q = q + (batch * tokens * heads + head) * K
        own_do = do + (batch * tokens * heads + head) * V
        share = 1.0
        alpha = 1.0
        if HAS_WINDOW:
            share = tl.load(weight + head)
        if HAS_FACTOR:
            alpha = tl.load(factor + head)
        if DO_WINDOW:
            for chunk in range(first_chunk, last_chunk + 1):
                place = chunk * C + rows
                there = place < tokens
                row = (batch * heads + head) * tokens + place
                over = tl.exp2(tl.load(log_inverse + row, mask=there, other=float("-inf")))
                shift = tl.load(delta + row, mask=there, other=0.0) * over
                top = tl.load(maximum + row, mask=there, other=0.0)
                x = load_columns(own_q, chunk * C, rows, heads * K, dims, tokens)
                scores = tl.dot(keys, x, input_precision=PRECISION) * scale
                age = (prefix + place)[None, :] - mine[:, None]
                far = tl.zeros([C], tl.int32) + window
                if HAS_REACH:
                    far = tl.load(reach + batch * tokens + place, mask=there, other=0)
                seen = (age >= 0) & (age < far[None, :]) & inside[:, None] & there[None, :]
                if HAS_CODES:
                    owner = document(
                        tl.load(codes + batch * key_tokens + prefix + place, mask=there, other=0)
                    )
                    seen = seen & (code[:, None] == owner[None, :])
                weights = tl.where(seen, tl.exp2((scores - top[None, :]) * LOG2E) * share, 0.0)
                y = load_columns(own_do, chunk * C, rows, heads * V, values, tokens)
                g = (y.to(tl.float32) * over[None, :]).to(keys.dtype)
                ds = weights * (tl.dot(held, g, input_precision=PRECISION) - shift[None, :])
                spare = tl.load(balance + row, mask=there, other=0.0)
                where = tl.load(place_of_top + row, mask=there, other=-1)
                ds = tl.where(seen & (where[None, :] == mine[:, None]), ds - spare[None, :], ds)
                x = load_rows(own_q, chunk * C, rows, heads * K, dims, tokens)
                for_k = tl.dot((ds * scale).to(keys.dtype), x, for_k, input_precision=PRECISION)
                y = load_rows(own_do, chunk * C, rows, heads * V, values, tokens)
                g = (y.to(tl.float32) * over[:, None]).to(keys.dtype)
                for_v = tl.dot(weights.to(keys.dtype), g, for_v, input_precision=PRECISION)
        if DO_LINEAR:
            nearest = tl.maximum(i - LINEAR_TILES + 1, 0)
            shared: tl.constexpr = heads // state_heads
            line = batch * state_heads + state_head
            query_projection = query_map + head * K * F
            projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
            # no query is ahead of the keys behind the last chunk
            alive = tl.where(i < chunks, 1.0, 0.0)
            if HAS_CODES:
                ahead = load_code(codes, batch, prefix + (i + 1) * C, key_tokens)
                reader = tl.where((past_code == ahead) & inside, alive, 0.0)
            else:
                reader = tl.where(inside, alive, 0.0)
            square = columns[:, None] + values[None, :] * F
            turned = columns[None, :] + values[:, None] * F
            for_y = tl.zeros([C, F], tl.float32)
            # softmax(y), then softmax(-y): one after the other, or the registers do not hold them
            for half in range(2):
                sign = tl.where(half == 0, 1.0, -1.0)
                features = row_softmax(tl.dot(keys, projection, input_precision=PRECISION) * sign)
                narrow = features.to(keys.dtype)
                for_features = tl.zeros([C, F], tl.float32)
                if (shared == 1) or (member == 0):
                    at = (line * chunks + last_chunk) * 2 + half
                    if WIDE:
                        read_k, read_v = features * reader[:, None], held.to(tl.float32) * reader[:, None]
                    else:
                        read_k = (features * reader[:, None]).to(keys.dtype)
                        read_v = (held.to(tl.float32) * reader[:, None]).to(keys.dtype)
                    for_v = tl.dot(
                        read_k, tl.load(states + at * F * V + square), for_v, input_precision=PRECISION
                    )
                    for_features = tl.dot(
                        read_v, tl.load(states + at * F * V + turned), for_features, input_precision=PRECISION
                    )
                    norm = tl.load(norms + at * F + columns)
                    if HAS_CARRY:
                        segment = last_chunk // per_segment
                        same = segment < segments - 1
                        if HAS_CODES:
                            behind = load_code(
                                codes, batch, prefix + (segment + 1) * per_segment * C, key_tokens
                            )
                            same = same & (ahead == behind)
                        if same:
                            origin = (line * segments + segment) * 2 + half
                            carry = carries + origin * F * V
                            for_v = tl.dot(read_k, tl.load(carry + square), for_v, input_precision=PRECISION)
                            for_features = tl.dot(
                                read_v, tl.load(carry + turned), for_features, input_precision=PRECISION
                            )
                            norm += tl.load(carry_norms + origin * F + columns)
                    for_features += reader[:, None] * norm[None, :]
                for chunk in range(nearest, last_chunk + 1):
                    place = chunk * C + rows
                    there = place < tokens
                    row = (batch * heads + head) * tokens + place
                    over = tl.exp2(tl.load(log_inverse + row, mask=there, other=float("-inf")))
                    shift = tl.load(delta + row, mask=there, other=0.0) * over
                    far = tl.zeros([C], tl.int32) + window
                    if HAS_REACH:
                        far = tl.load(reach + batch * tokens + place, mask=there, other=0)
                    age = (prefix + place)[None, :] - mine[:, None]
                    seen = (age >= far[None, :]) & inside[:, None] & there[None, :]
                    if HAS_CODES:
                        owner = document(
                            tl.load(codes + batch * key_tokens + prefix + place, mask=there, other=0)
                        )
                        seen = seen & (past_code[:, None] == owner[None, :])
                    x = load_columns(own_q, chunk * C, rows, heads * K, dims, tokens)
                    turned_map = tl.load(query_projection + dims[None, :] * F + columns[:, None])
                    other = column_softmax(tl.dot(turned_map, x, input_precision=PRECISION) * sign) * alpha
                    pairs = tl.dot(narrow, other.to(keys.dtype), input_precision=PRECISION)
                    pairs = tl.where(seen, pairs, 0.0).to(keys.dtype)
                    y = load_rows(own_do, chunk * C, rows, heads * V, values, tokens)
                    g = (y.to(tl.float32) * over[:, None]).to(keys.dtype)
                    for_v = tl.dot(pairs, g, for_v, input_precision=PRECISION)
                    y = load_columns(own_do, chunk * C, rows, heads * V, values, tokens)
                    g = (y.to(tl.float32) * over[None, :]).to(keys.dtype)
                    dw = (tl.dot(held, g, input_precision=PRECISION) - shift[None, :]) * alpha
                    dw = tl.where(seen, dw, 0.0).to(keys.dtype)
                    x = load_rows(own_q, chunk * C, rows, heads * K, dims, tokens)
                    straight = tl.load(query_projection + dims[:, None] * F + columns[None, :])
                    other = row_softmax(tl.dot(x, straight, input_precision=PRECISION) * sign)
                    for_features = tl.dot(dw, other.to(keys.dtype), for_features, input_precision=PRECISION)
                spread = tl.sum(features * for_features, 1)
                for_y += sign * features * (for_features - spread[:, None])
            narrow_y = for_y.to(keys.dtype)
            if TRAIN_MAPS:
                to = ((batch * key_tokens + mine) * heads + head)[:, None] * F + columns[None, :]
                tl.store(dy + to, narrow_y, mask=inside[:, None])
            projection = tl.load(key_map + state_head * K * F + dims[None, :] * F + columns[:, None])
            for_k = tl.dot(narrow_y, projection, for_k, input_precision=PRECISION)
    tl.store(dk + own_k, for_k.to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv + own_v, for_v.to(dv.dtype.element_ty), mask=inside[:, None])
