"""Gradients of q, k, a, b and the log decays, chunk by chunk and key dimension by key dimension.

The pairs [x, y] of readers and writers have the gradients dO V^T, dO U^T, dR V^T and dR U^T (of [q, k], [q, b], [a, k]
and [a, b]); the sums of `triton_products` taken the other way round spread them over the two. A log decay moves what
passes over it: what the readers behind it take, less what is read of the writers behind it, and all that leaves the
chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_columns, load_rows, store_rows
from linearize.kernels.gated_linear.triton_common import in_halves
from linearize.kernels.gated_linear.triton_levels import (
    CAP,
    in_base_two,
    level_pairs,
    row_exponents,
    row_sums,
)
from linearize.kernels.generalized_delta.triton_common import (
    chunk_documents,
    earlier,
    later,
    met,
)
from linearize.kernels.generalized_delta.triton_products import scaled


@triton.jit
def all_pairs(
    x, y, first, rows, x_stride, y_stride, tokens, V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr
):
    """Products of the rows of x with those of y, [C, C]."""
    C: tl.constexpr = rows.shape[0]
    result = tl.zeros([C, C], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        left = load_rows(x, first, rows, x_stride, values, tokens)
        right = load_columns(y, first, rows, y_stride, values, tokens)
        result = tl.dot(left, right, result, input_precision=PRECISION)
    return result


@triton.jit
def from_state(
    x, state, first, rows, stride, dims, tokens, V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr
):
    """Products of the rows of x with those of a state [K, V], columns `dims`."""
    C: tl.constexpr = rows.shape[0]
    result = tl.zeros([C, dims.shape[0]], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        left = load_rows(x, first, rows, stride, values, tokens)
        right = tl.load(state + dims[None, :] * V + values[:, None])
        result = tl.dot(left, right, result, input_precision=PRECISION)
    return result


@triton.jit
def weighed(pairs, tile):
    """Pairs as the operand that `tile` is multiplied by."""
    return pairs.to(tile.dtype)


@triton.jit
def halved_readers(
    with_b, with_k, b, k, g, first, rows, stride, dims, tokens, levels,
    STRICT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pairs give their readers, of a chunk that is halved."""
    shift: tl.constexpr = 1 if STRICT else 0
    result = tl.zeros([rows.shape[0], dims.shape[0]], tl.float32)
    for level in range(0, levels + 1):
        lanes = rows + (level >> 3)
        pairs, middle = level_pairs(lanes, 6 - level, level == levels, True, STRICT)
        high, low = in_halves(in_base_two(load_rows(g, first, lanes, stride, dims, tokens)))
        down = tl.exp2(tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP))
        right = scaled(load_rows(k, first, lanes, stride, dims, tokens), down, WIDE)
        found = tl.dot(weighed(tl.where(pairs, with_k, 0.0), right), right, input_precision=PRECISION)
        right = scaled(load_rows(b, first, lanes, stride, dims, tokens), down, WIDE)
        found = tl.dot(weighed(tl.where(pairs, with_b, 0.0), right), right, found, input_precision=PRECISION)
        result += found * tl.exp2(tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP))
    return result


@triton.jit
def halved_writers(
    weights, x, g, first, rows, own_stride, stride, dims, tokens, levels,
    STRICT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pairs [writer, reader] with the readers x give their writers."""
    shift: tl.constexpr = 1 if STRICT else 0
    result = tl.zeros([rows.shape[0], dims.shape[0]], tl.float32)
    for level in range(0, levels + 1):
        lanes = rows + (level >> 3)
        pairs, middle = level_pairs(lanes, 6 - level, level == levels, False, STRICT)
        high, low = in_halves(in_base_two(load_rows(g, first, lanes, stride, dims, tokens)))
        up = tl.exp2(tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP))
        right = scaled(load_rows(x, first, lanes, own_stride, dims, tokens), up, WIDE)
        found = tl.dot(weighed(tl.where(pairs, weights, 0.0), right), right, input_precision=PRECISION)
        result += found * tl.exp2(tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP))
    return result


@triton.jit
def for_writers(
    y, q, a, do, missing, g, passed, first, rows, end, dims, tokens, levels,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HALVED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns `dims` of the gradient of the writers whose values are y, from the readers of their chunk."""
    group: tl.constexpr = heads // state_heads
    stride: tl.constexpr = state_heads * K
    result = tl.zeros([rows.shape[0], dims.shape[0]], tl.float32)
    for member in range(group):
        pairs = all_pairs(
            y, do + member * V, first, rows, state_heads * V, heads * V, tokens, V, BV, PRECISION
        )
        pairs = tl.where(later(end, rows, 0), pairs, 0.0)
        if HALVED:
            result += halved_writers(
                pairs, q + member * K, g, first, rows, heads * K, stride, dims, tokens, levels, False, WIDE, PRECISION
            )  # fmt: skip
        else:
            right = load_rows(q + member * K, first, rows, heads * K, dims, tokens)
            right = scaled(right, tl.exp2(passed), WIDE)
            result = tl.dot(weighed(pairs, right), right, result, input_precision=PRECISION)
    others = all_pairs(y, missing, first, rows, state_heads * V, state_heads * V, tokens, V, BV, PRECISION)
    others = tl.where(later(end, rows, 1), others, 0.0)
    if HALVED:
        result += halved_writers(
            others, a, g, first, rows, stride, stride, dims, tokens, levels, True, WIDE, PRECISION
        )
    else:
        up = tl.exp2(met(passed, g, first, rows, stride, dims, tokens, True))
        finders = scaled(load_rows(a, first, rows, stride, dims, tokens), up, WIDE)
        result = tl.dot(weighed(others, finders), finders, result, input_precision=PRECISION)
        result *= tl.exp2(-passed)
    return result


@triton.jit
def finished(
    inner, y, x, leaving, passed, late, to, open_after, first, rows, dims, tokens,
    state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the writers x with the values y, stored, once what the chunk's end wants is added to `inner`.

    Returns:
        What the decays get of it.
    """
    stride: tl.constexpr = state_heads * K
    beyond = from_state(y, leaving, first, rows, state_heads * V, dims, tokens, V, BV, PRECISION)
    beyond *= tl.exp2(tl.minimum(late[None, :] - passed, 0.0)) * open_after[:, None]
    total = inner + beyond
    store_rows(to, first, rows, stride, dims, tokens, total)
    own = load_rows(x, first, rows, stride, dims, tokens).to(tl.float32)
    return tl.sum(beyond * own, 0)[None, :] - tl.cumsum(total * own, 0, reverse=True)


@triton.jit
def for_readers(
    y, v, change, k, b, g, passed, first, rows, begin, y_stride, dims, tokens, levels,
    state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, STRICT: tl.constexpr,
    HALVED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns `dims` of the gradient of the readers whose outputs have the gradient y, from their chunk's writers."""
    stride: tl.constexpr = state_heads * K
    seen = earlier(begin, rows, STRICT)
    with_k = all_pairs(y, v, first, rows, y_stride, state_heads * V, tokens, V, BV, PRECISION)
    with_k = tl.where(seen, with_k, 0.0)
    if HALVED:
        with_b = all_pairs(y, change, first, rows, y_stride, state_heads * V, tokens, V, BV, PRECISION)
        with_b = tl.where(seen, with_b, 0.0)
        found = halved_readers(
            with_b, with_k, b, k, g, first, rows, stride, dims, tokens, levels, STRICT, WIDE, PRECISION
        )
    else:
        down = tl.exp2(-passed)
        keys = scaled(load_rows(k, first, rows, stride, dims, tokens), down, WIDE)
        found = tl.dot(weighed(with_k, keys), keys, input_precision=PRECISION)
        with_b = all_pairs(y, change, first, rows, y_stride, state_heads * V, tokens, V, BV, PRECISION)
        moves = scaled(load_rows(b, first, rows, stride, dims, tokens), down, WIDE)
        found = tl.dot(weighed(tl.where(seen, with_b, 0.0), moves), moves, found, input_precision=PRECISION)
        found *= tl.exp2(met(passed, g, first, rows, stride, dims, tokens, STRICT))
    return found


@triton.jit(do_not_specialize=["tokens", "chunks"])
def gradient_kernel(
    q, k, v, a, b, g, docs, do, halved, kept, states, leaving, change, missing, dq, dk, da, db, dg, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, HALVED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK columns of dq [B, T, H, K], dk, da, db and dg [B, T, M, K], of one chunk of one head of the state."""
    parts: tl.constexpr = K // BK
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    at = row_head * chunks + chunk
    often = tl.load(halved + at)
    mine = often != 0 if HALVED else often == 0
    if mine:
        group: tl.constexpr = heads // state_heads
        batch, head = row_head // state_heads, row_head % state_heads
        first = chunk * C
        rows, dims = tl.arange(0, C), part * BK + tl.arange(0, BK)
        stride: tl.constexpr = state_heads * K
        width: tl.constexpr = state_heads * V
        of_keys = (batch * tokens * state_heads + head) * K
        of_values = (batch * tokens * state_heads + head) * V
        of_queries = (batch * tokens * heads + head * group) * K
        of_outputs = (batch * tokens * heads + head * group) * V
        states += at * K * V
        leaving += at * K * V
        k += of_keys
        a += of_keys
        b += of_keys
        g += of_keys
        v += of_values
        change += of_values
        missing += of_values
        q += of_queries
        dq += of_queries
        do += of_outputs
        begin, end, entering, open_after, _whole = chunk_documents(docs, batch, first, rows, tokens)
        decays = in_base_two(load_rows(g, first, rows, stride, dims, tokens))
        passed, early = row_exponents(decays, rows, C)
        late = tl.sum(decays, 0) - early
        for_g = tl.zeros([C, BK], tl.float32)
        for member in range(group):
            y = do + member * V
            for_q = for_readers(
                y, v, change, k, b, g, passed, first, rows, begin, heads * V, dims, tokens, often, state_heads, K, V,
                BV, False, HALVED, WIDE, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            outer = from_state(y, states, first, rows, heads * V, dims, tokens, V, BV, PRECISION)
            for_q += outer * tl.exp2(tl.minimum(passed + early[None, :], 0.0)) * entering[:, None]
            store_rows(dq + member * K, first, rows, heads * K, dims, tokens, for_q)
            x = load_rows(q + member * K, first, rows, heads * K, dims, tokens)
            for_g += for_q * x.to(tl.float32)
        tl.debug_barrier()
        for_a = for_readers(
            missing, v, change, k, b, g, passed, first, rows, begin, width, dims, tokens, often, state_heads, K, V,
            BV, True, HALVED, WIDE, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        held = from_state(missing, states, first, rows, width, dims, tokens, V, BV, PRECISION)
        since = met(passed, g, first, rows, stride, dims, tokens, True) + early[None, :]
        for_a += held * tl.exp2(tl.minimum(since, 0.0)) * entering[:, None]
        store_rows(da + of_keys, first, rows, stride, dims, tokens, for_a)
        for_a *= load_rows(a, first, rows, stride, dims, tokens).to(tl.float32)
        # summed side by side, so that no tile waits for another; an a has not met its own decay
        for_g += for_a
        for_g = tl.cumsum(for_g, 0, reverse=True) - for_a
        tl.debug_barrier()
        # what leaves the chunk passes over all of its decays
        passing = tl.zeros([BK], tl.float32)
        for piece in range(V // BV):
            values = piece * BV + tl.arange(0, BV)
            place = dims[None, :] * V + values[:, None]
            state = tl.load(states + place).to(tl.float32)
            passing += tl.sum(state * tl.load(leaving + place).to(tl.float32), 0)
        passing *= tl.load(kept + at * K + dims)
        for_g += passing[None, :]
        tl.debug_barrier()
        for_k = for_writers(
            v, q, a, do, missing, g, passed, first, rows, end, dims, tokens, often, heads, state_heads, K, V, BV,
            HALVED, WIDE, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        for_g += finished(
            for_k, v, k, leaving, passed, late, dk + of_keys, open_after, first, rows, dims, tokens, state_heads, K,
            V, BV, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        for_b = for_writers(
            change, q, a, do, missing, g, passed, first, rows, end, dims, tokens, often, heads, state_heads, K, V, BV,
            HALVED, WIDE, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        for_g += finished(
            for_b, change, b, leaving, passed, late, db + of_keys, open_after, first, rows, dims, tokens, state_heads,
            K, V, BV, PRECISION,
        )  # fmt: skip
        store_rows(dg + of_keys, first, rows, stride, dims, tokens, for_g)
