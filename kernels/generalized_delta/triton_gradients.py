"""Gradients of q, k, a, b and the log decays, chunk by chunk and key dimension by key dimension.

The pairs [x, y] of readers and writers have the gradients dO V^T, dO U^T, dR V^T and dR U^T (of [q, k], [q, b], [a, k]
and [a, b]); the sums of `triton_products` taken the other way round spread them over the two. A log decay moves what
passes over it: what the readers behind it take, less what is read of the writers behind it, and all that leaves the
chunk.

Pairs that lie on one side of a decay are in both sums, and where decays are strong they are far larger than what passes
over it. So both sums are of the same products of three rounded numbers: the pair's gradient and the two sides as
operands. With a side as it was before rounding, a log decay's gradient was 6 % off in bfloat16.
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
    row_sums,
    under_decay,
)
from linearize.kernels.generalized_delta.triton_common import (
    chunk_documents,
    decays_from_start,
    earlier,
    later,
    summed,
    until_end,
)


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
    found, moved, with_b, with_k, x, b, k, g, first, rows, x_stride, stride, dims, tokens, levels,
    STRICT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pairs give their readers x and the decays, of a chunk that is halved; added to `found` and `moved`."""
    shift: tl.constexpr = 1 if STRICT else 0
    for level in range(0, levels + 1):
        lanes = rows + (level >> 3)
        pairs, middle = level_pairs(lanes, 6 - level, level == levels, True, STRICT)
        high, low = in_halves(in_base_two(load_rows(g, first, lanes, stride, dims, tokens)))
        down = tl.exp2(tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP))
        right = under_decay(load_rows(k, first, lanes, stride, dims, tokens), down, WIDE, PRECISION)
        given = tl.dot(weighed(tl.where(pairs, with_k, 0.0), right), right, input_precision=PRECISION)
        right = under_decay(load_rows(b, first, lanes, stride, dims, tokens), down, WIDE, PRECISION)
        given = tl.dot(weighed(tl.where(pairs, with_b, 0.0), right), right, given, input_precision=PRECISION)
        up = tl.exp2(tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP))
        found += given * up
        own = under_decay(load_rows(x, first, lanes, x_stride, dims, tokens), up, WIDE, PRECISION)
        moved += given * own.to(tl.float32)
    return found, moved


@triton.jit
def halved_writers(
    found, moved, weights, x, y, g, first, rows, x_stride, stride, dims, tokens, levels,
    STRICT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pairs [writer, reader] with the readers x give their writers y; `moved` loses what the decays get."""
    shift: tl.constexpr = 1 if STRICT else 0
    for level in range(0, levels + 1):
        lanes = rows + (level >> 3)
        pairs, middle = level_pairs(lanes, 6 - level, level == levels, False, STRICT)
        high, low = in_halves(in_base_two(load_rows(g, first, lanes, stride, dims, tokens)))
        up = tl.exp2(tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP))
        right = under_decay(load_rows(x, first, lanes, x_stride, dims, tokens), up, WIDE, PRECISION)
        given = tl.dot(weighed(tl.where(pairs, weights, 0.0), right), right, input_precision=PRECISION)
        down = tl.exp2(tl.minimum(-row_sums(high, low, lanes, middle, lanes), CAP))
        found += given * down
        own = under_decay(load_rows(y, first, lanes, stride, dims, tokens), down, WIDE, PRECISION)
        moved -= given * own.to(tl.float32)
    return found, moved


@triton.jit
def for_readers(
    moved, y, x, to, states, v, change, k, b, g, sums, first, rows, begin, entering, y_stride, x_stride, dims, tokens,
    levels, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, STRICT: tl.constexpr,
    HALVED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns `dims` of the gradient of the readers x whose outputs have the gradient y, stored.

    Returns:
        `moved` with what passes over the decays to these readers.
    """
    stride: tl.constexpr = state_heads * K
    seen = earlier(begin, rows, STRICT)
    found = from_state(y, states, first, rows, y_stride, dims, tokens, V, BV, PRECISION)
    tl.debug_barrier()
    with_k = all_pairs(y, v, first, rows, y_stride, state_heads * V, tokens, V, BV, PRECISION)
    with_k = tl.where(seen, with_k, 0.0)
    if HALVED:
        lanes = rows + (levels >> 3)
        found *= decays_from_start(g, first, lanes, stride, dims, tokens, STRICT) * entering[:, None]
        moved += found * load_rows(x, first, rows, x_stride, dims, tokens).to(tl.float32)
        with_b = all_pairs(y, change, first, rows, y_stride, state_heads * V, tokens, V, BV, PRECISION)
        with_b = tl.where(seen, with_b, 0.0)
        found, moved = halved_readers(
            found, moved, with_b, with_k, x, b, k, g, first, rows, x_stride, stride, dims, tokens, levels, STRICT,
            WIDE, PRECISION,
        )  # fmt: skip
        store_rows(to, first, rows, x_stride, dims, tokens, found)
    else:
        found = found * tl.exp2(-tl.load(sums + dims))[None, :] * entering[:, None]
        down = tl.exp2(-summed(sums, rows, dims, K, False))
        right = under_decay(load_rows(k, first, rows, stride, dims, tokens), down, WIDE, PRECISION)
        found = tl.dot(weighed(with_k, right), right, found, input_precision=PRECISION)
        tl.debug_barrier()
        with_b = all_pairs(y, change, first, rows, y_stride, state_heads * V, tokens, V, BV, PRECISION)
        right = under_decay(load_rows(b, first, rows, stride, dims, tokens), down, WIDE, PRECISION)
        found = tl.dot(weighed(tl.where(seen, with_b, 0.0), right), right, found, input_precision=PRECISION)
        up = tl.exp2(summed(sums, rows, dims, K, STRICT))
        store_rows(to, first, rows, x_stride, dims, tokens, found * up)
        own = under_decay(load_rows(x, first, rows, x_stride, dims, tokens), up, WIDE, PRECISION)
        moved += found * own.to(tl.float32)
    return moved


@triton.jit
def for_writers(
    moved, y, x, to, leaving, q, a, do, missing, g, sums, first, rows, end, open_after, dims, tokens, levels,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HALVED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns `dims` of the gradient of the writers x whose values are y, stored.

    Returns:
        `moved` less what of it passes over no decay, and what passes over all that follow in the chunk, [dims].
    """
    group: tl.constexpr = heads // state_heads
    stride: tl.constexpr = state_heads * K
    passed = summed(sums, rows, dims, K, False)
    found = tl.zeros([rows.shape[0], dims.shape[0]], tl.float32)
    for member in range(group):
        pairs = all_pairs(
            y, do + member * V, first, rows, state_heads * V, heads * V, tokens, V, BV, PRECISION
        )
        pairs = tl.where(later(end, rows, 0), pairs, 0.0)
        if HALVED:
            found, moved = halved_writers(
                found, moved, pairs, q + member * K, x, g, first, rows, heads * K, stride, dims, tokens, levels, False,
                WIDE, PRECISION,
            )  # fmt: skip
        else:
            right = load_rows(q + member * K, first, rows, heads * K, dims, tokens)
            right = under_decay(right, tl.exp2(passed), WIDE, PRECISION)
            found = tl.dot(weighed(pairs, right), right, found, input_precision=PRECISION)
    pairs = all_pairs(y, missing, first, rows, state_heads * V, state_heads * V, tokens, V, BV, PRECISION)
    pairs = tl.where(later(end, rows, 1), pairs, 0.0)
    if HALVED:
        found, moved = halved_writers(
            found, moved, pairs, a, x, g, first, rows, stride, stride, dims, tokens, levels, True, WIDE, PRECISION
        )  # fmt: skip
    else:
        up = tl.exp2(summed(sums, rows, dims, K, True))
        right = under_decay(load_rows(a, first, rows, stride, dims, tokens), up, WIDE, PRECISION)
        found = tl.dot(weighed(pairs, right), right, found, input_precision=PRECISION)
        down = tl.exp2(-passed)
        own = under_decay(load_rows(x, first, rows, stride, dims, tokens), down, WIDE, PRECISION)
        moved -= found * own.to(tl.float32)
        found *= down
    tl.debug_barrier()
    beyond = from_state(y, leaving, first, rows, state_heads * V, dims, tokens, V, BV, PRECISION)
    beyond *= until_end(sums, rows, dims, K) * open_after[:, None]
    store_rows(to, first, rows, stride, dims, tokens, found + beyond)
    beyond *= load_rows(x, first, rows, stride, dims, tokens).to(tl.float32)
    return moved - beyond, tl.sum(beyond, 0)


@triton.jit
def through_chunk(states, leaving, dims, V: tl.constexpr, BV: tl.constexpr):
    """Products of a state that enters with the gradient of the one that leaves, of each key dimension."""
    result = tl.zeros([dims.shape[0]], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        place = dims[None, :] * V + values[:, None]
        state = tl.load(states + place).to(tl.float32)
        result += tl.sum(state * tl.load(leaving + place).to(tl.float32), 0)
    return result


@triton.jit(do_not_specialize=["tokens", "chunks"])
def gradient_kernel(
    q, k, v, a, b, g, sums, docs, do, halved, kept, states, leaving, change, missing, dq, dk, da, db, dg, tokens,
    chunks, heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
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
        sums += at * (C + 1) * K
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
        moved = tl.zeros([C, BK], tl.float32)
        for member in range(group):
            moved = for_readers(
                moved, do + member * V, q + member * K, dq + member * K, states, v, change, k, b, g, sums, first,
                rows, begin, entering, heads * V, heads * K, dims, tokens, often, state_heads, K, V, BV, False, HALVED,
                WIDE, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
        through = through_chunk(states, leaving, dims, V, BV) * tl.load(kept + at * K + dims)
        tl.debug_barrier()
        # always `rows`, but the compiler does not know it, and makes decays again that it would keep in registers
        if not HALVED:
            rows = rows + (chunks >> 31)
        moved, over = for_writers(
            moved, v, k, dk + of_keys, leaving, q, a, do, missing, g, sums, first, rows, end, open_after, dims,
            tokens, often, heads, state_heads, K, V, BV, HALVED, WIDE, PRECISION,
        )  # fmt: skip
        through += over
        tl.debug_barrier()
        if not HALVED:
            rows = rows + (tokens >> 31)
        moved, over = for_writers(
            moved, change, b, db + of_keys, leaving, q, a, do, missing, g, sums, first, rows, end, open_after, dims,
            tokens, often, heads, state_heads, K, V, BV, HALVED, WIDE, PRECISION,
        )  # fmt: skip
        through += over
        tl.debug_barrier()
        if not HALVED:
            rows = rows + ((tokens + chunks) >> 31)
        # last, since an a has not met its own decay: no other tile has to wait for that
        own = for_readers(
            tl.zeros([C, BK], tl.float32), missing, a, da + of_keys, states, v, change, k, b, g, sums, first, rows,
            begin, entering, width, stride, dims, tokens, often, state_heads, K, V, BV, True, HALVED, WIDE, PRECISION,
        )  # fmt: skip
        moved = tl.cumsum(moved + own, 0, reverse=True) - own
        store_rows(dg + of_keys, first, rows, stride, dims, tokens, moved + through[None, :])
