"""The output of window_linear: every chunk of queries by itself, a flash-style window and then the linear past."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window_linear.triton_common import (
    LOG2E,
    column_maps,
    document,
    load_code,
    load_columns,
    load_rows,
    row_maps,
)
from linearize.kernels.window_linear.triton_pins import BEHIND, add_pinned, pinned_top


@triton.jit
def output_kernel(
    q, k, v, query_map, key_map, weight, factor, sink, codes, past_codes, pin, asking, reach,
    states, norms, carries, carry_norms, out, maximum, log_inverse, query_lse,
    tokens, key_tokens, prefix, base, chunks, window, per_segment, segments, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TILES: tl.constexpr, LINEAR_TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_CODES: tl.constexpr, HAS_REACH: tl.constexpr, HAS_CARRY: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, PINS: tl.constexpr,
):  # fmt: skip
    """One chunk of one query head: out [B, T, H, V], row maximum and 1 / denominator [B, T, H].

    Key tile i holds keys base + [i C, (i + 1) C); chunk c sees tiles c .. c + TILES - 1 key by key, the last one being
    its own, and everything before them in the state that enters it.
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
    v += (batch * key_tokens * kv_heads + kv_head) * V
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    values = tile * BV + tl.arange(0, BV)
    place = chunk * C + rows
    inside = place < tokens
    mine = prefix + place
    x = load_rows(q, chunk * C, rows, heads * K, dims, tokens)
    far = tl.zeros([C], tl.int32) + window
    if HAS_REACH:
        far = tl.load(reach + batch * tokens + place, mask=inside, other=0)
    owner = tl.zeros([C], tl.int32)
    if HAS_CODES:
        owner = document(tl.load(codes + batch * key_tokens + mine, mask=inside, other=0))
    top = tl.full([C], float("-inf"), tl.float32)
    total = tl.zeros([C], tl.float32)
    result = tl.zeros([C, BV], tl.float32)
    # tiles that lie in front of the first key are empty
    first_tile = tl.maximum(chunk, -base // C)
    if HAS_WINDOW:
        if HAS_SINK:
            top = tl.zeros([C], tl.float32) + tl.load(sink + head)
            total += 1.0
        if PINS > 0:
            pinned = tl.load(pin + batch * tokens + place, mask=inside, other=BEHIND)
            asking += (batch * tokens * heads + head) * K
            asks = load_rows(asking, chunk * C, rows, heads * K, dims, tokens)
            highest_pin = pinned_top(
                asks, k, codes, batch, pinned, mine - far, owner, scale, key_tokens, dims, kv_heads * K, PINS
            )
            higher = tl.maximum(top, highest_pin)
            if HAS_SINK:
                total *= tl.exp2((top - higher) * LOG2E)
            top = higher
        for i in range(first_tile, chunk + TILES):
            here = base + i * C
            other = here + rows
            scores = tl.dot(
                x, load_columns(k, here, rows, kv_heads * K, dims, key_tokens), input_precision=PRECISION
            )
            age = mine[:, None] - other[None, :]
            seen = (age >= 0) & (age < far[:, None]) & (other >= 0)[None, :] & (other < key_tokens)[None, :]
            if HAS_CODES:
                code = tl.load(
                    codes + batch * key_tokens + other, mask=(other >= 0) & (other < key_tokens), other=-1
                )
                seen = seen & (code[None, :] == owner[:, None])
            scores = tl.where(seen, scores * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2((scores - safe[:, None]) * LOG2E)
            decay = tl.exp2((top - safe) * LOG2E)
            total = total * decay + tl.sum(weights, 1)
            y = tl.load(
                v + other[:, None] * (kv_heads * V) + values[None, :],
                mask=((other >= 0) & (other < key_tokens))[:, None], other=0.0,
            )  # fmt: skip
            result = tl.dot(weights.to(y.dtype), y, result * decay[:, None], input_precision=PRECISION)
            top = higher
    top = tl.where(top == float("-inf"), 0.0, top)
    if HAS_WINDOW:
        if PINS > 0:
            asks = load_rows(asking, chunk * C, rows, heads * K, dims, tokens)
            total, result = add_pinned(
                asks, k, v, codes, batch, pinned, mine - far, owner, -top * LOG2E, total, result, scale * LOG2E,
                key_tokens, dims, values, kv_heads * K, kv_heads * V, PINS,
            )  # fmt: skip
        share = tl.load(weight + head)
        total *= share
        result *= share
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
    projection = tl.load(key_map + state_head * K * F + dims[None, :] * F + columns[:, None])
    up_q, down_q = up.to(x.dtype), down.to(x.dtype)
    for i in range(first_tile, chunk + LINEAR_TILES):
        here = base + i * C
        other = here + rows
        keys = load_columns(k, here, rows, kv_heads * K, dims, key_tokens)
        up_k, down_k = column_maps(tl.dot(projection, keys, input_precision=PRECISION))
        pairs = tl.dot(up_q, up_k.to(x.dtype), input_precision=PRECISION)
        pairs = tl.dot(down_q, down_k.to(x.dtype), pairs, input_precision=PRECISION)
        age = mine[:, None] - other[None, :]
        seen = (age >= far[:, None]) & (other >= 0)[None, :] & (other < key_tokens)[None, :]
        if HAS_CODES:
            code = tl.load(
                past_codes + batch * key_tokens + other, mask=(other >= 0) & (other < key_tokens), other=-1
            )
            seen = seen & (code[None, :] == owner[:, None])
        pairs = tl.where(seen, pairs, 0.0)
        total += tl.sum(pairs, 1)
        y = tl.load(
            v + other[:, None] * (kv_heads * V) + values[None, :],
            mask=((other >= 0) & (other < key_tokens))[:, None], other=0.0,
        )  # fmt: skip
        result = tl.dot(pairs.to(y.dtype), y, result, input_precision=PRECISION)
    line = batch * state_heads + state_head
    at = (line * chunks + chunk) * 2
    if HAS_CODES:
        entering = load_code(codes, batch, base + chunk * C - 1, key_tokens)
        up = tl.where((owner == entering)[:, None], up, 0.0)
        down = tl.where((owner == entering)[:, None], down, 0.0)
    up_norm = tl.load(norms + at * F + columns)
    down_norm = tl.load(norms + (at + 1) * F + columns)
    held = columns[:, None] + values[None, :] * F
    up_sum = tl.load(states + at * F * V + held)
    down_sum = tl.load(states + (at + 1) * F * V + held)
    if WIDE:
        up_read, down_read = up, down
    else:
        up_read, down_read = up.to(x.dtype), down.to(x.dtype)
    result = tl.dot(up_read, up_sum, result, input_precision=PRECISION)
    result = tl.dot(down_read, down_sum, result, input_precision=PRECISION)
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
            result = tl.dot(up_read, up_sum, result, input_precision=PRECISION)
            result = tl.dot(down_read, down_sum, result, input_precision=PRECISION)
    total += tl.sum(up * up_norm[None, :], 1) + tl.sum(down * down_norm[None, :], 1)
    over = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    lines = (batch * tokens + place) * heads + head
    row = (batch * heads + head) * tokens + place
    tl.store(
        out + lines[:, None] * V + values[None, :], (result * over[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None],
    )  # fmt: skip
    if tile == 0:
        tl.store(maximum + row, top, mask=inside)
        tl.store(log_inverse + row, tl.log2(over), mask=inside)
