"""Numerators and denominators, and dv: weighted sums of values, or of their gradients, tile by tile.

    o_t  = sum over s <= t of w_ts v_s    + S^T phi(q_t) of the state before the period,     w = 1 + z + z^2 / 2
    dv_s = sum over t >= s of w_ts do_t   + A^T phi(k_s) of the state's gradient behind it,  z_ts = scale q_t.k_s

are one function. Inside a period the weights come from the products of q and k themselves.
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
def value_kernel(
    a, b, c, codes, out, denominator, states, norms, carries, carry_norms, spans, scale, root,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, value_heads: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, HAS_CODES: tl.constexpr, HAS_CARRY: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CAUSAL: a, b, c are q, k, v and a program is a tile and block of o of a query head; else k, q, do, and of dv.

    dv is [B, T, M, V], a part for each head of the state. `states` to `spans` are those of the direction.
    """
    own_heads: tl.constexpr = heads if CAUSAL else state_heads
    other_heads: tl.constexpr = state_heads if CAUSAL else heads
    c_heads: tl.constexpr = value_heads if CAUSAL else heads
    group: tl.constexpr = heads // state_heads
    tile, tile_of_values = tl.program_id(0) // (V // BV), tl.program_id(0) % (V // BV)
    batch, head = (tl.program_id(1) // own_heads).to(tl.int64), tl.program_id(1) % own_heads
    state_head = head // group if CAUSAL else head
    line = batch * state_heads + state_head
    period = tile // TILES
    segment, start = period // per_segment, period * TILES * C
    rows, dims, values = tl.arange(0, C), tl.arange(0, DP), tile_of_values * BV + tl.arange(0, BV)
    place = tile * C + rows
    inside = place < tokens
    own = a + (batch * tokens * own_heads + head) * D
    reach = inside
    if HAS_CODES:
        code = load_code(codes, batch, place, tokens)
        owner = document(code)
        if CAUSAL:
            reach = owner == document(load_code(codes, batch, start - 1, tokens))
        else:
            reach = code == document(load_code(codes, batch, start + TILES * C - 1, tokens))
    result = tl.zeros([C, BV], tl.float32)
    total = tl.zeros([C], tl.float32)
    for block in range(0, (F + BF - 1) // BF):
        features = block * BF + tl.arange(0, BF)
        first, second, has_first, has_second, factor = feature_table(block, root, D, BF)
        left, right = load_factors(own, place, own_heads * D, inside, first, second, has_first, has_second)
        phi = tl.where(reach[:, None], left * right * factor[None, :], 0.0)
        state = load_state(
            (states, carries, spans), line, period, periods, segment, segments,
            features[:, None] * V + values[None, :], (features < F)[:, None], F * V, HAS_CARRY, not CAUSAL,
        )  # fmt: skip
        if NORMALIZE and CAUSAL:
            norm = load_state(
                (norms, carry_norms, spans), line, period, periods, segment, segments, features, features < F, F,
                HAS_CARRY, False,
            )  # fmt: skip
            total += tl.sum(phi * norm[None, :], 1)
        result = tl.dot(phi.to(state.dtype), state, result, input_precision=PRECISION)
    x = load_rows(own, place, own_heads * D, dims, tokens, D)
    low = period * TILES if CAUSAL else tile
    high = tile + 1 if CAUSAL else tl.minimum((period + 1) * TILES, tiles)
    for member in range(1 if CAUSAL else group):
        other = state_head if CAUSAL else head * group + member
        keys = b + (batch * tokens * other_heads + other) * D
        c_head = state_head // (state_heads // value_heads) if CAUSAL else other
        moved = c + (batch * tokens * c_heads + c_head) * V
        for i in range(low, high):
            there = i * C + rows
            y = load_columns(keys, there, other_heads * D, dims, tokens, D)
            z = scale * tl.dot(x, y, input_precision=PRECISION)
            if CAUSAL:
                seen = place[:, None] >= there[None, :]
            else:
                seen = (place[:, None] <= there[None, :]) & (there < tokens)[None, :]
            if HAS_CODES:
                if CAUSAL:
                    seen = seen & (owner[:, None] == load_code(codes, batch, there, tokens)[None, :])
                else:
                    seen = seen & (code[:, None] == document(load_code(codes, batch, there, tokens))[None, :])
            weights = tl.where(seen, 1.0 + z + 0.5 * z * z, 0.0)
            if NORMALIZE and CAUSAL:
                total += tl.sum(weights, 1)
            brought = load_rows(moved, there, c_heads * V, values, tokens, V)
            if WIDE:
                result = tl.dot(weights, brought.to(tl.float32), result, input_precision=PRECISION)
            else:
                result = tl.dot(weights.to(brought.dtype), brought, result, input_precision=PRECISION)
    lines = (batch * tokens + place) * own_heads + head
    tl.store(
        out + lines[:, None] * V + values[None, :], result.to(out.dtype.element_ty), mask=inside[:, None]
    )
    if NORMALIZE and CAUSAL:  # noqa: SIM102
        if tile_of_values == 0:
            tl.store(denominator + lines, total, mask=inside)
