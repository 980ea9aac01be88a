"""Gradients of window_linear where the window is a whole number of chunks; geometry as in `triton_aligned_forward`.

With p_tj the weights divided by their row's sum, D_t = do_t . o_t and dw_tj = do_t . v_j - D_t, the window's scores get
ds = p dw, and the largest of a row also what keeps the row's sum at zero (see `triton_backward`). One sum is the other:
dw of the oldest tile serves the window in one triangle and the features in the other. Sums of weights, shares and
factors go into exponents, so neither a maximum nor a sum of features is looked for again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_aligned_forward import load_codes, square_of_scores
from linearize.kernels.window_linear.triton_common import LOG2E, document, load_code, load_rows
from linearize.kernels.window_linear.triton_pins import (
    BEHIND,
    pinned_gradient,
    pinned_rows,
    pinned_to_queries,
)


@triton.jit
def aligned_query_gradient_kernel(
    q, k, v, out, do, query_map, key_map, weight, factor, sink, codes, past_codes, pin, asking, key_lse,
    query_lse,
    states, norms, carries, carry_norms, maximum, log_inverse,
    dq, dasking, pin_weights, pin_ds, dy, delta, balance, share_gradient, place_of_top, dsink,
    tokens, key_tokens, prefix, base, chunks, per_segment, segments, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CODES: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, TRAIN_MAPS: tl.constexpr, INPUTS: tl.constexpr,
    PRECISION: tl.constexpr, PINS: tl.constexpr, HAS_ASKING: tl.constexpr,
):  # fmt: skip
    """dq, the gradient dy of q's projection, and per row: D, the sum of the window's ds, where its maximum is.

    Without `INPUTS` dy, D and the gradients of factors and sink alone.
    """
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
    log_over = tl.load(log_inverse + row, mask=inside, other=float("-inf"))
    old_keys = load_rows(k, oldest, rows, kv_heads * K, dims, key_tokens)
    old_values = load_rows(v, oldest, rows, kv_heads * V, values, key_tokens)
    shift = tl.sum(incoming.to(tl.float32) * answer.to(tl.float32), 1)
    tl.store(delta + row, shift, mask=inside)
    owner = tl.zeros([C], tl.int32)
    if HAS_CODES:
        owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=inside, other=0))
        old_code = load_codes(past_codes, batch, oldest + rows, key_tokens)
    if PINS > 0:
        pinned = tl.load(pin + batch * tokens + place, mask=inside, other=BEHIND)
        asking += (batch * tokens * heads + head) * K
        asks = load_rows(asking, chunk * C, rows, heads * K, dims, tokens)
        pin_row = (batch * heads + head) * PINS * tokens + place
        top = tl.load(maximum + row, mask=inside, other=0.0)
        best_pin, pin_place, pin_part, pin_sum = pinned_gradient(
            asks, incoming, k, v, codes, batch, pinned, oldest + rows, owner,
            tl.log2(tl.load(weight + head)) + log_over - top, shift, pin_row, inside, pin_weights, pin_ds, scale,
            tokens, key_tokens, dims, values, kv_heads * K, kv_heads * V, PINS, INPUTS,
        )  # fmt: skip
    # of a zero that the compiler knows, selections would be made of sixteen-bit numbers, one by one
    nothing = scale - scale
    for_q = tl.zeros([C, K], tl.float32)
    past = tl.zeros([C], tl.float32)
    line = batch * state_heads + state_head
    at = (line * chunks + chunk) * 2
    held = values[:, None] * F + columns[None, :]
    dw = tl.dot(incoming, tl.trans(old_values), input_precision=PRECISION) - shift[:, None]
    seen = causal
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
            alive = alive & (
                load_code(codes, batch, base + segment * per_segment * C - 1, key_tokens) == entering
            )
        carried = columns < tl.where(alive, F, 0)
    far = tl.where(seen, dw, nothing).to(x.dtype)
    key_projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
    projection = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
    there = oldest + rows
    exists = (there >= 0) & (there < key_tokens)
    own_lse = key_lse + line * 2 * key_tokens + there
    query_line = query_lse + (batch * heads + head) * 2 * tokens + place
    from_state = incoming.to(tl.float32) if WIDE else incoming
    alpha = tl.exp2(log_over)
    if HAS_FACTOR:
        alpha *= tl.load(factor + head)
    for_y = tl.zeros([C, F], tl.float32)
    # softmax(y), then softmax(-y), each from its own projection: a product costs less than holding the first one's
    # (with carries, both halves' tiles at once would leave room for two programs instead of three)
    STAGES: tl.constexpr = 2 if HAS_CARRY else 3
    for half in tl.range(0, 2, num_stages=STAGES):
        sign = 1.0 - 2.0 * half
        lse = tl.load(own_lse + half * key_tokens, mask=exists, other=float("inf"))
        key_logits = tl.dot(old_keys, key_projection, input_precision=PRECISION)
        phi_k = tl.exp2(key_logits * (sign * LOG2E) - lse[:, None]).to(x.dtype)
        norm = tl.load(norms + (at + half) * F + columns)
        sums = tl.load(states + (at + half) * F * V + held)
        for_phi = tl.dot(from_state, sums, input_precision=PRECISION)
        if HAS_CARRY:
            norm += tl.load(carry_norms + (origin + half) * F + columns, mask=carried, other=0.0)
            sums = tl.load(carries + (origin + half) * F * V + held, mask=carried[None, :], other=0.0)
            for_phi = tl.dot(from_state, sums, for_phi, input_precision=PRECISION)
        for_phi -= shift[:, None] * norm[None, :]
        if HAS_CODES:
            for_phi *= reader[:, None]
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
    lines = (batch * tokens + place) * heads + head
    if TRAIN_MAPS:
        tl.store(
            dy + lines[:, None] * F + columns[None, :],
            for_y.to(dy.dtype.element_ty),
            mask=inside[:, None],
        )
    if INPUTS:
        if LAG > 0:
            # in units of the scores' gradient, to which the window adds
            for_y *= LOG2E / scale
        narrow_y = for_y.to(x.dtype)
    if LAG > 0:
        own_keys = load_rows(k, own, rows, kv_heads * K, dims, key_tokens)
        scores = square_of_scores(
            x, own_keys, old_keys, causal, codes, batch, oldest, own, rows, owner, key_tokens, scale,
            HAS_CODES, PRECISION,
        )  # fmt: skip
        best = tl.max(scores, 1)
        if INPUTS or HAS_SINK:
            best_place = tl.where(causal, own + rows[None, :], oldest + rows[None, :])
            best_place = tl.min(tl.where(scores == best[:, None], best_place, 2147483647), 1)
        top = tl.load(maximum + row, mask=inside, other=0.0)
        share = tl.log2(tl.load(weight + head))
        offset = share + log_over - top
        weights = tl.exp2(scores + offset[:, None])
        near_part = tl.sum(weights, 1)
        own_values = load_rows(v, own, rows, kv_heads * V, values, key_tokens)
        dw = tl.dot(incoming, tl.trans(own_values), input_precision=PRECISION)
        old_dw = tl.dot(incoming, tl.trans(old_values), input_precision=PRECISION)
        ds = weights * (tl.where(causal, dw, old_dw) - shift[:, None])
        sum_of_ds = tl.sum(ds, 1)
        if INPUTS:
            own_ds = tl.where(causal, ds, nothing)
            for_q = tl.dot(own_ds.to(x.dtype), own_keys, for_q, input_precision=PRECISION)
            for_q = tl.dot((ds - own_ds).to(x.dtype), old_keys, for_q, input_precision=PRECISION)
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
                if INPUTS or HAS_SINK:
                    higher = tl.max(between, 1)
                    found = tl.min(
                        tl.where(between == higher[:, None], middle + rows[None, :], 2147483647), 1
                    )
                    best_place = tl.where(higher > best, found, best_place)
                    best = tl.maximum(best, higher)
                weights = tl.exp2(between + offset[:, None])
                y = load_rows(v, middle, rows, kv_heads * V, values, key_tokens)
                ds = weights * (tl.dot(incoming, tl.trans(y), input_precision=PRECISION) - shift[:, None])
                sum_of_ds += tl.sum(ds, 1)
                near_part += tl.sum(weights, 1)
                if INPUTS:
                    for_q = tl.dot(ds.to(x.dtype), keys, for_q, input_precision=PRECISION)
        if PINS > 0:
            if INPUTS or HAS_SINK:
                best_place = tl.where(best_pin > best, pin_place, best_place)
                best = tl.maximum(best, best_pin)
            near_part += pin_part
            sum_of_ds += pin_sum
        for_sink = tl.zeros([C], tl.float32)
        if HAS_SINK:
            logit = tl.load(sink + head) * LOG2E
            weights_of_sink = tl.exp2(logit + offset)
            near_part += weights_of_sink
            for_sink = -weights_of_sink * shift
            sum_of_ds += for_sink
            best_place = tl.where(best > logit, best_place, -1)
            best = tl.maximum(best, logit)
        if INPUTS or HAS_SINK:
            best_place = tl.where(best == float("-inf"), -1, best_place)
            for_sink = tl.where(best_place == -1, for_sink - sum_of_ds, for_sink)
        if INPUTS:
            if PINS == 0:
                keys = pinned_rows(k, best_place, (best_place >= 0) & inside, kv_heads * K, dims)
                for_q -= sum_of_ds[:, None] * keys
            tl.store(balance + row, sum_of_ds, mask=inside)
            tl.store(place_of_top + row, best_place, mask=inside)
        # two estimates of one number, whose errors come from the rounding of `out` in D and cancel like this
        tl.store(share_gradient + row, (1.0 - near_part) * sum_of_ds - near_part * past, mask=inside)
        if HAS_SINK:
            tl.store(dsink + row, for_sink, mask=inside)
    if INPUTS:
        # until here in 16 bits: half as many registers as the product
        for_q = tl.dot(narrow_y, tl.trans(projection), for_q, input_precision=PRECISION)
        if LAG > 0:
            for_q *= scale / LOG2E
            if PINS > 0:
                for_q = pinned_to_queries(
                    k, codes, batch, pinned, oldest + rows, owner, for_q, sum_of_ds, best_place, pin_row, inside,
                    pin_ds, dasking + lines * K, scale / LOG2E, tokens, key_tokens, dims, kv_heads * K, PINS,
                    HAS_ASKING,
                )  # fmt: skip
        dq += (batch * tokens * heads + head) * K
        tl.store(
            dq + place[:, None] * (heads * K) + dims[None, :],
            for_q.to(dq.dtype.element_ty),
            mask=inside[:, None],
        )
