"""The output of window_linear where the window is a whole number of chunks: fewer products and exponentials, few masks.

Query t of a chunk and key s of the oldest tile, a window behind it, are just behind the window where s <= t and in it where
s > t; in the chunk's own tile it is s <= t that the softmax sees. So the two triangles of one square hold the own tile's and
the oldest tile's scores, one maximum and one exponential serve both, and the oldest tile's values are multiplied once, by
softmax weights in one triangle and by products of features in the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_common import LOG2E, document, load_code, load_rows, row_maps


@triton.jit
def load_codes(codes, batch, position, key_tokens):
    """Codes of key positions, -1 (nobody's) outside."""
    inside = (position >= 0) & (position < key_tokens)
    return tl.load(codes + batch * key_tokens + position, mask=inside, other=-1)


@triton.jit
def aligned_output_kernel(
    q, k, v, query_map, key_map, weight, factor, sink, codes, key_lse,
    states, norms, carries, carry_norms, out, maximum, inverse, query_lse,
    tokens, key_tokens, prefix, base, chunks, per_segment, segments, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LAG: tl.constexpr,
    HAS_LINEAR: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SINK: tl.constexpr, HAS_CODES: tl.constexpr,
    HAS_CARRY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one query head: out [B, T, H, V]; by [B, H, T] the row maximum (times log2 e) and 1 / denominator.

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
    old_values = load_rows(v, oldest, rows, kv_heads * V, lanes, key_tokens)
    owner = tl.zeros([C], tl.int32)
    if HAS_CODES:
        owner = document(tl.load(codes + batch * key_tokens + prefix + place, mask=inside, other=0))
    row = (batch * heads + head) * tokens + place
    result = tl.zeros([C, BV], tl.float32)
    total = tl.zeros([C], tl.float32)
    mixed = tl.zeros([C, C], tl.float32)
    if LAG > 0:
        own_keys = load_rows(k, own, rows, kv_heads * K, dims, key_tokens)
        scores = tl.dot(x, tl.trans(own_keys), input_precision=PRECISION)
        old_scores = tl.dot(x, tl.trans(old_keys), input_precision=PRECISION)
        scores = tl.where(causal, scores, old_scores) * scale
        if HAS_CODES:
            old_code = load_codes(codes, batch, oldest + rows, key_tokens)
            own_code = load_codes(codes, batch, own + rows, key_tokens)
            seen = tl.where(causal, own_code[None, :], old_code[None, :]) == owner[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        else:
            # without documents, tiles before the first key are all that can be missing
            scores = tl.where(causal | (oldest >= 0), scores, float("-inf"))
        top = tl.max(scores, 1)
        share = 0.0
        if HAS_LINEAR:
            share = tl.log2(tl.load(weight + head))
        if HAS_SINK:
            logit = tl.load(sink + head) * LOG2E
            top = tl.maximum(top, logit)
        # a row that sees nothing has weights exp2(-inf - 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        if HAS_SINK:
            total = tl.exp2(logit + share - top)
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
                higher = tl.maximum(top, tl.max(between, 1))
                weights = tl.exp2(between + (share - higher)[:, None])
                decay = tl.exp2(top - higher)
                total = total * decay + tl.sum(weights, 1)
                y = load_rows(v, middle, rows, kv_heads * V, lanes, key_tokens)
                result = tl.dot(weights.to(y.dtype), y, result * decay[:, None], input_precision=PRECISION)
                top = higher
        weights = tl.exp2(scores + (share - top)[:, None])
        total += tl.sum(weights, 1)
        own_values = load_rows(v, own, rows, kv_heads * V, lanes, key_tokens)
        near = tl.where(causal, weights, 0.0).to(own_values.dtype)
        result = tl.dot(near, own_values, result, input_precision=PRECISION)
        mixed = tl.where(causal, 0.0, weights)
        if tile == 0:
            tl.store(maximum + row, top, mask=inside)
    if HAS_LINEAR:
        columns = tl.arange(0, F)
        projection = tl.load(query_map + head * K * F + dims[:, None] * F + columns[None, :])
        up, down, up_lse, down_lse = row_maps(tl.dot(x, projection, input_precision=PRECISION))
        if tile == 0:
            line = (batch * heads + head) * 2 * tokens + place
            tl.store(query_lse + line, up_lse, mask=inside)
            tl.store(query_lse + line + tokens, down_lse, mask=inside)
        if HAS_FACTOR:
            up *= tl.load(factor + head)
            down *= tl.load(factor + head)
        up_q, down_q = up.to(x.dtype), down.to(x.dtype)
        projection = tl.load(key_map + state_head * K * F + dims[None, :] * F + columns[:, None])
        turned = tl.dot(projection, tl.trans(old_keys), input_precision=PRECISION) * LOG2E
        there = oldest + rows
        exists = (there >= 0) & (there < key_tokens)
        line = (batch * state_heads + state_head) * 2 * key_tokens + there
        # features of keys that do not exist are exp2(-inf)
        up_k = tl.exp2(turned - tl.load(key_lse + line, mask=exists, other=float("inf"))[None, :])
        down_k = tl.exp2(-turned - tl.load(key_lse + line + key_tokens, mask=exists, other=float("inf"))[None, :])
        pairs = tl.dot(up_q, up_k.to(x.dtype), input_precision=PRECISION)
        pairs = tl.dot(down_q, down_k.to(x.dtype), pairs, input_precision=PRECISION)
        if HAS_CODES:
            code = load_codes(codes, batch, there, key_tokens)
            pairs = tl.where(code[None, :] == owner[:, None], pairs, 0.0)
        pairs = tl.where(causal, pairs, 0.0)
        total += tl.sum(pairs, 1)
        mixed = mixed + pairs if LAG > 0 else pairs
        if HAS_CODES:
            entering = load_code(codes, batch, oldest - 1, key_tokens)
            reader = tl.where(owner == entering, 1.0, 0.0)
            up *= reader[:, None]
            down *= reader[:, None]
            up_q, down_q = up.to(x.dtype), down.to(x.dtype)
        line = batch * state_heads + state_head
        at = (line * chunks + chunk) * 2
        up_norm = tl.load(norms + at * F + columns)
        down_norm = tl.load(norms + (at + 1) * F + columns)
        held = values[:, None] * F + columns[None, :]
        if WIDE:
            up_read, down_read = up, down
        else:
            up_read, down_read = up_q, down_q
        up_sum = tl.load(states + at * F * V + held)
        result = tl.dot(up_read, tl.trans(up_sum), result, input_precision=PRECISION)
        down_sum = tl.load(states + (at + 1) * F * V + held)
        result = tl.dot(down_read, tl.trans(down_sum), result, input_precision=PRECISION)
        if HAS_CARRY:
            segment = chunk // per_segment
            origin = (line * segments + segment) * 2
            alive = segment > 0
            if HAS_CODES:
                alive = alive & (load_code(codes, batch, base + segment * per_segment * C - 1, key_tokens) == entering)
            if alive:
                up_norm += tl.load(carry_norms + origin * F + columns)
                down_norm += tl.load(carry_norms + (origin + 1) * F + columns)
                square = columns[:, None] * V + values[None, :]
                up_sum = tl.load(carries + origin * F * V + square)
                result = tl.dot(up_read, up_sum, result, input_precision=PRECISION)
                down_sum = tl.load(carries + (origin + 1) * F * V + square)
                result = tl.dot(down_read, down_sum, result, input_precision=PRECISION)
        total += tl.sum(up * up_norm[None, :] + down * down_norm[None, :], 1)
    result = tl.dot(mixed.to(old_values.dtype), old_values, result, input_precision=PRECISION)
    over = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    lines = (batch * tokens + place) * heads + head
    tl.store(
        out + lines[:, None] * V + values[None, :], (result * over[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None],
    )  # fmt: skip
    if tile == 0:
        tl.store(inverse + row, over, mask=inside)
