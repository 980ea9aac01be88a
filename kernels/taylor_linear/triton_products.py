"""dq and dk, tile by tile: gradients of weights through the products, and those of features through the states.

With dw_ts = do_t.v_s + weight_t the weights' gradient, and dw (1 + z) scale that of a product q_t.k_s:

    dq_t = scale sum over s <= t of dw_ts (1 + z_ts) k_s   + what dphi = S do_t + weight_t n gives to q_t
    dk_s = scale sum over t >= s of dw_ts (1 + z_ts) q_t   + what dphi = A v_s + a gives to k_s

where S, n are the state before the period, A, a the gradient of the one behind it. A feature c x_i x_j hands
c x_j dphi on to x_i and c x_i dphi to x_j: two products with matrices of zeros and ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.taylor_linear.triton_common import (
    document,
    feature_table,
    load_code,
    load_columns,
    load_factors,
    load_rows,
    load_state,
)


@triton.jit
def product_kernel(
    q, k, v, do, weight, codes, out, states, norms, carries, carry_norms, spans, scale, root,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, value_heads: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, HAS_CODES: tl.constexpr, HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dq of a query head (CAUSAL), or of dk of a head of the state; states as in `value_kernel`."""
    own_heads: tl.constexpr = heads if CAUSAL else state_heads
    other_heads: tl.constexpr = state_heads if CAUSAL else heads
    own_values: tl.constexpr = heads if CAUSAL else value_heads
    other_values: tl.constexpr = value_heads if CAUSAL else heads
    group: tl.constexpr = heads // state_heads
    shared: tl.constexpr = state_heads // value_heads
    tile = tl.program_id(0)
    batch, head = (tl.program_id(1) // own_heads).to(tl.int64), tl.program_id(1) % own_heads
    state_head = head // group if CAUSAL else head
    line = batch * state_heads + state_head
    period = tile // TILES
    segment, start = period // per_segment, period * TILES * C
    rows, dims, columns = tl.arange(0, C), tl.arange(0, DP), tl.arange(0, BV)
    place = tile * C + rows
    inside = place < tokens
    own = (q if CAUSAL else k) + (batch * tokens * own_heads + head) * D
    mine = (do if CAUSAL else v) + (batch * tokens * own_values + (head if CAUSAL else head // shared)) * V
    lines = (batch * tokens + place) * own_heads + head
    reach = inside
    if HAS_CODES:
        code = load_code(codes, batch, place, tokens)
        owner = document(code)
        if CAUSAL:
            reach = owner == document(load_code(codes, batch, start - 1, tokens))
        else:
            reach = code == document(load_code(codes, batch, start + TILES * C - 1, tokens))
    bias = tl.zeros([C], tl.float32)
    if NORMALIZE and CAUSAL:
        bias = tl.load(weight + lines, mask=inside, other=0.0)
    result = tl.zeros([C, DP], tl.float32)
    for block in range(0, (F + BF - 1) // BF):
        features = block * BF + tl.arange(0, BF)
        first, second, has_first, has_second, factor = feature_table(block, root, D, BF)
        change = tl.zeros([C, BF], tl.float32)
        for i in range(0, V // BV):
            values = i * BV + columns
            state = load_state(
                (states, carries, spans), line, period, periods, segment, segments,
                features[None, :] * V + values[:, None], (features < F)[None, :], F * V, HAS_CARRY, not CAUSAL,
            )  # fmt: skip
            read = load_rows(mine, place, own_values * V, values, tokens, V)
            change = tl.dot(read.to(state.dtype), state, change, input_precision=PRECISION)
        if NORMALIZE:
            norm = load_state(
                (norms, carry_norms, spans), line, period, periods, segment, segments, features, features < F, F,
                HAS_CARRY, not CAUSAL,
            )  # fmt: skip
            change += bias[:, None] * norm[None, :] if CAUSAL else norm[None, :]
        change = tl.where(reach[:, None], change * factor[None, :], 0.0)
        left, right = load_factors(own, place, own_heads * D, inside, first, second, has_first, has_second)
        to_first = ((first[:, None] == dims[None, :]) & has_first[:, None]).to(states.dtype.element_ty)
        to_second = ((second[:, None] == dims[None, :]) & has_second[:, None]).to(states.dtype.element_ty)
        result = tl.dot((change * right).to(to_first.dtype), to_first, result, input_precision=PRECISION)
        result = tl.dot((change * left).to(to_first.dtype), to_second, result, input_precision=PRECISION)
    x = load_rows(own, place, own_heads * D, dims, tokens, D)
    low = period * TILES if CAUSAL else tile
    high = tile + 1 if CAUSAL else tl.minimum((period + 1) * TILES, tiles)
    for member in range(1 if CAUSAL else group):
        other = state_head if CAUSAL else head * group + member
        theirs = (k if CAUSAL else q) + (batch * tokens * other_heads + other) * D
        moved = (v if CAUSAL else do) + (
            batch * tokens * other_values + (state_head // shared if CAUSAL else other)
        ) * V
        for i in range(low, high):
            there = i * C + rows
            change = tl.zeros([C, C], tl.float32)
            for j in range(0, V // BV):
                values = j * BV + columns
                read = load_rows(mine, place, own_values * V, values, tokens, V)
                brought = load_columns(moved, there, other_values * V, values, tokens, V)
                change = tl.dot(read, brought, change, input_precision=PRECISION)
            if NORMALIZE:
                if CAUSAL:
                    change += bias[:, None]
                else:
                    at = (batch * tokens + there) * heads + other
                    change += tl.load(weight + at, mask=there < tokens, other=0.0)[None, :]
            y = load_columns(theirs, there, other_heads * D, dims, tokens, D)
            z = scale * tl.dot(x, y, input_precision=PRECISION)
            seen = place[:, None] >= there[None, :] if CAUSAL else place[:, None] <= there[None, :]
            if HAS_CODES:
                if CAUSAL:
                    seen = seen & (owner[:, None] == load_code(codes, batch, there, tokens)[None, :])
                else:
                    seen = seen & (code[:, None] == document(load_code(codes, batch, there, tokens))[None, :])
            change = tl.where(seen, change * (1.0 + z) * scale, 0.0)
            across = load_rows(theirs, there, other_heads * D, dims, tokens, D)
            if WIDE:
                result = tl.dot(change, across.to(tl.float32), result, input_precision=PRECISION)
            else:
                result = tl.dot(change.to(across.dtype), across, result, input_precision=PRECISION)
    tl.store(
        out + lines[:, None] * D + dims[None, :], result.to(out.dtype.element_ty),
        mask=inside[:, None] & (dims < D)[None, :],
    )  # fmt: skip
