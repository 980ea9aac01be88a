"""The output of window_linear where the window is a whole number of chunks: fewer products and exponentials, few masks.

Query t of a chunk and key s of the oldest tile, a window behind it, are just behind the window where s <= t and in it
where s > t; in the chunk's own tile it is s <= t that the softmax sees. So the two triangles of one square hold the own
tile's and the oldest tile's scores, one maximum and one exponential serve both, and the oldest tile's values are
multiplied once, by softmax weights in one triangle and by products of features in the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_common import LOG2E, document, load_code, load_rows, row_features
from linearize.kernels.window_linear.triton_pins import BEHIND, add_pinned, pinned_top


@triton.jit
def load_codes(codes, batch, position, key_tokens):
    """Codes of key positions, -1 (nobody's) outside."""
    inside = (position >= 0) & (position < key_tokens)
    return tl.load(codes + batch * key_tokens + position, mask=inside, other=-1)


@triton.jit
def square_of_scores(
    x, own_keys, old_keys, causal, codes, batch, oldest, own, rows, owner, key_tokens, scale,
    HAS_CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [C, C] times `scale`: of the own tile where `causal`, of the oldest one elsewhere; -inf where unseen."""
    own_scores = tl.dot(x, tl.trans(own_keys), input_precision=PRECISION)
    old_scores = tl.dot(x, tl.trans(old_keys), input_precision=PRECISION)
    if HAS_CODES:
        scores = tl.where(causal, own_scores, old_scores) * scale
        old_code = load_codes(codes, batch, oldest + rows, key_tokens)
        own_code = load_codes(codes, batch, own + rows, key_tokens)
        seen = tl.where(causal, own_code[None, :], old_code[None, :]) == owner[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    else:
        # without documents, tiles before the first key are all that can be missing
        missing = tl.where(oldest >= 0, 0.0, float("-inf"))
        scores = tl.where(causal, own_scores * scale, old_scores * scale + missing)
    return scores


@triton.jit
def aligned_output_kernel(
    q, k, v, query_map, key_map, weight, factor, sink, codes, past_codes, pin, asking, key_lse,
    states, norms, carries, carry_norms, out, maximum, log_inverse, query_lse,
    tokens, key_tokens, prefix, base, chunks, per_segment, segments, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CODES: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, PINS: tl.constexpr,
):  # fmt: skip
    """One chunk of one query head: out [B, T, H, V]; by [B, H, T] the row maximum (times log2 e) and log2 of
    1 / denominator.

    LAG is the window in chunks; zero leaves linear attention alone.
    """
    parts: tl.constexpr = V // BV
    chunk = tl.program_id(0) // parts
    tile = tl.program_id(0) % parts
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    state_head = head // (heads // state_heads)
    q += (batch * tokens * heads + head) * K
    k += (batch * key_tokens * kv_heads + kv_head) * K
    v += (batch * key_tokens * kv_heads + kv_head) * V + tile * BV
    rows, dims, lanes = tl.arange(0, C), tl.arange(0, K), tl.arange(0, BV)
    values = tile * BV + lanes
    place = chunk * C + rows
    inside = place < tokens
    oldest = base + chunk * C
    own = oldest + LAG * C
    causal = rows[None, :] <= rows[:, None]
    x = load_rows(q, chunk * C, rows, heads * K, dims, tokens)
    old_keys = load_rows(k, oldest, rows, kv_heads * K, dims, key_tokens)
    owner = tl.zeros([C], tl.int32)
    if HAS_CODES:
        owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=inside, other=0))
    if PINS > 0:
        pinned = tl.load(pin + batch * tokens + place, mask=inside, other=BEHIND)
        asking += (batch * tokens * heads + head) * K
        asks = load_rows(asking, chunk * C, rows, heads * K, dims, tokens)
        highest_pin = pinned_top(
            asks, k, codes, batch, pinned, oldest + rows, owner, scale, key_tokens, dims, kv_heads * K, PINS
        )
    row = (batch * heads + head) * tokens + place
    result = tl.zeros([C, BV], tl.float32)
    pairs = tl.zeros([C, C], tl.float32)
    total = tl.zeros([C], tl.float32)
    columns = tl.arange(0, F)
    query_projection = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
    projection = tl.load(key_map + state_head * K * F + dims[:, None] * F + columns[None, :])
    there = oldest + rows
    exists = (there >= 0) & (there < key_tokens)
    line = batch * state_heads + state_head
    own_lse = key_lse + line * 2 * key_tokens + there
    query_line = query_lse + (batch * heads + head) * 2 * tokens + place
    at = (line * chunks + chunk) * 2
    held = values[:, None] * F + columns[None, :]
    alpha = 1.0
    if HAS_FACTOR:
        alpha = tl.load(factor + head)
    reader = tl.full([C], 1.0, tl.float32)
    if HAS_CODES:
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
    # softmax(y), then softmax(-y), each from its own projection: a product costs less than holding the first one's
    # (with carries, both halves' tiles at once would leave room for two programs instead of three)
    STAGES: tl.constexpr = 2 if HAS_CARRY else 3
    for half in tl.range(0, 2, num_stages=STAGES):
        sign = LOG2E - 2.0 * LOG2E * half
        # features of keys that do not exist are exp2(-inf)
        lse = tl.load(own_lse + half * key_tokens, mask=exists, other=float("inf"))
        turned = tl.dot(tl.trans(projection), tl.trans(old_keys), input_precision=PRECISION)
        phi_k = tl.exp2(turned * sign - lse[None, :]).to(x.dtype)
        phi, lse = row_features(tl.dot(x, query_projection, input_precision=PRECISION) * sign)
        if tile == 0:
            tl.store(query_line + half * tokens, lse, mask=inside)
        if HAS_FACTOR:
            phi *= alpha
        norm = tl.load(norms + (at + half) * F + columns)
        if HAS_CARRY:
            norm += tl.load(carry_norms + (origin + half) * F + columns, mask=carried, other=0.0)
        total += tl.sum(phi * norm[None, :], 1) * reader
        reading = phi
        if HAS_CODES:
            reading = phi * reader[:, None]
        if not WIDE:
            reading = reading.to(x.dtype)
        sums = tl.load(states + (at + half) * F * V + held)
        result = tl.dot(reading, tl.trans(sums), result, input_precision=PRECISION)
        if HAS_CARRY:
            sums = tl.load(carries + (origin + half) * F * V + held, mask=carried[None, :], other=0.0)
            result = tl.dot(reading, tl.trans(sums), result, input_precision=PRECISION)
        pairs = tl.dot(phi.to(x.dtype), phi_k, pairs, input_precision=PRECISION)
    if HAS_CODES:
        code = load_codes(past_codes, batch, there, key_tokens)
        pairs = tl.where(code[None, :] == owner[:, None], pairs, 0.0)
    old_values = load_rows(v, oldest, rows, kv_heads * V, lanes, key_tokens)
    # of a zero that the compiler knows, selections would be made of sixteen-bit numbers, one by one
    nothing = scale - scale
    if LAG > 0:
        past = result
        share = tl.log2(tl.load(weight + head))
        top = tl.full([C], float("-inf"), tl.float32)
        near_total = tl.zeros([C], tl.float32)
        if HAS_SINK:
            top = tl.zeros([C], tl.float32) + tl.load(sink + head) * LOG2E
            near_total += tl.exp2(share)
        if PINS > 0:
            higher = tl.maximum(top, highest_pin)
            if HAS_SINK:
                near_total *= tl.exp2(top - higher)
            top = higher
        if LAG > 1:
            result = tl.zeros([C, BV], tl.float32)
            for i in range(1, LAG):
                middle = oldest + i * C
                keys = load_rows(k, middle, rows, kv_heads * K, dims, key_tokens)
                scores = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * scale
                if HAS_CODES:
                    code = load_codes(codes, batch, middle + rows, key_tokens)
                    scores = tl.where(code[None, :] == owner[:, None], scores, float("-inf"))
                else:
                    scores = tl.where(middle >= 0, scores, float("-inf"))
                higher = tl.maximum(top, tl.max(scores, 1))
                # a row that has seen nothing yet has weights exp2(-inf - 0)
                safe = tl.where(higher == float("-inf"), 0.0, higher)
                weights = tl.exp2(scores + (share - safe)[:, None])
                decay = tl.exp2(top - safe)
                near_total = near_total * decay + tl.sum(weights, 1)
                y = load_rows(v, middle, rows, kv_heads * V, lanes, key_tokens)
                result = tl.dot(weights.to(y.dtype), y, result * decay[:, None], input_precision=PRECISION)
                top = higher
        own_keys = load_rows(k, own, rows, kv_heads * K, dims, key_tokens)
        own_values = load_rows(v, own, rows, kv_heads * V, lanes, key_tokens)
        scores = square_of_scores(
            x, own_keys, old_keys, causal, codes, batch, oldest, own, rows, owner, key_tokens, scale,
            HAS_CODES, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        higher = tl.where(higher == float("-inf"), 0.0, higher)
        if LAG > 1 or HAS_SINK:
            decay = tl.exp2(top - higher)
            near_total *= decay
        if LAG > 1:
            result *= decay[:, None]
            result += past
        if tile == 0:
            tl.store(maximum + row, higher, mask=inside)
        weights = tl.exp2(scores + (share - higher)[:, None])
        near = tl.where(causal, weights, nothing)
        mixed = tl.where(causal, pairs, weights)
        total += near_total + tl.sum(near + mixed, 1)
        result = tl.dot(near.to(own_values.dtype), own_values, result, input_precision=PRECISION)
    else:
        mixed = tl.where(causal, pairs, nothing)
        total += tl.sum(mixed, 1)
    result = tl.dot(mixed.to(old_values.dtype), old_values, result, input_precision=PRECISION)
    if LAG > 0:  # noqa: SIM102 (Triton knows both when compiling)
        if PINS > 0:
            asks = load_rows(asking, chunk * C, rows, heads * K, dims, tokens)
            total, result = add_pinned(
                asks, k, v, codes, batch, pinned, there, owner, share - higher, total, result, scale, key_tokens,
                dims, lanes, kv_heads * K, kv_heads * V, PINS,
            )  # fmt: skip
    over = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    lines = (batch * tokens + place) * heads + head
    tl.store(
        out + lines[:, None] * V + values[None, :], (result * over[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None],
    )  # fmt: skip
    if tile == 0:
        tl.store(log_inverse + row, tl.log2(over), mask=inside)
