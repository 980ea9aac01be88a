"""Gradients of queries, keys, strengths and decays of a chunk, with a decay for every key dimension.

Queries i and keys i as they read meet earlier keys j as they are written, under exp(G_i - G_j). With weights dM =
dO U^T and dA = -dr U^T, all that is wanted are their sums over one side, which `triton_levels` of gated_linear says how
to make of scaled tiles. A decay's gradient is what passes over it: q dq and k dk of readers from its token on, less
k dk of writers from it on, and of the chunk's whole what passes to its end, from its keys and the state before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import (
    load_columns,
    load_ends,
    load_rows,
    load_scalars,
    store_rows,
    store_scalars,
)
from linearize.kernels.gated_delta.triton_key_common import (
    end_rows,
    load_bounds,
    seen_later,
    sees_earlier,
    start_rows,
)
from linearize.kernels.gated_linear.triton_common import in_halves
from linearize.kernels.gated_linear.triton_levels import (
    CAP,
    in_base_two,
    level_pairs,
    row_exponents,
    row_sums,
    under_decay,
)


@triton.jit
def products(x, y, first, rows, x_stride, y_stride, tokens, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Products of every token's x with every token's y, [C, C]."""
    found = tl.zeros([C, C], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        own = load_rows(x, first, rows, x_stride, values, tokens)
        turned = load_columns(y, first, rows, y_stride, values, tokens)
        found = tl.dot(own, turned, found, input_precision=PRECISION)
    return found


@triton.jit
def through_state(x, state, first, rows, stride, dims, tokens, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                  BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x [C, V] times a stored state transposed, [V, dims]."""
    found = tl.zeros([C, BK], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        own = load_rows(x, first, rows, stride, values, tokens)
        square = tl.load(state + dims[None, :] * V + values[:, None])
        found = tl.dot(own, square, found, input_precision=PRECISION)
    return found


@triton.jit
def block_factors(g, first, rows, stride, dims, tokens, C: tl.constexpr):
    """Of a chunk that is not halved, the decays up to each row from its middle, and up to the middle from its start.

    Down from each row to the middle is one over the former, which costs fewer registers than to have both.
    """
    passed, early = row_exponents(in_base_two(load_rows(g, first, rows, stride, dims, tokens)), rows, C)
    return tl.exp2(passed), tl.exp2(early)


@triton.jit
def reader(q, k, do, missing, turn, line, heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr,
           V: tl.constexpr):  # fmt: skip
    """Who reads in a turn, what its readings' gradients are, and their strides: queries of a group, then keys."""
    group: tl.constexpr = heads // state_heads
    x, y = k, missing
    if turn < group:
        x, y = q + (line + turn) * K, do + (line + turn) * V
    if group == 1:
        return x, y, heads * K, heads * V
    else:
        count = tl.where(turn < group, heads, state_heads)
        return x, y, count * K, count * V


@triton.jit
def level_factors(g, first, lanes, middle, stride, dims, tokens):
    """Decays from each row's middle up to it, for readers, and from it to its middle, for writers; [C, dims] each."""
    high, low = in_halves(in_base_two(load_rows(g, first, lanes, stride, dims, tokens)))
    passed = row_sums(high, low, lanes, middle, lanes)
    return tl.exp2(tl.minimum(passed, CAP)), tl.exp2(tl.minimum(-passed, CAP))


@triton.jit
def sum_over_writers(
    found, moved, x, change, a, k, g, first, rows, begin, strict, share, levels, dims, x_stride, a_stride, stride,
    value_stride, tokens, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For every reader i sum_j (x_i . u_j) exp(G_i - G_j) k_j over earlier keys of a halved chunk, added to `found`.

    And its products with share_i a_i, which pass over the decays, to `moved`.
    """
    for level in range(0, levels + 1):
        # always `rows`, but the compiler does not know it: nothing of a level may wait for it in registers
        lanes = rows + (level >> 3)
        pairs, middle = level_pairs(lanes, 6 - level, level == levels, True, False)
        scores = products(x, change, first, lanes, x_stride, value_stride, tokens, V, BV, C, PRECISION)
        scores = tl.where(pairs & sees_earlier(begin, lanes, strict), scores, 0.0)
        up, down = level_factors(g, first, lanes, middle, stride, dims, tokens)
        right = under_decay(load_rows(k, first, lanes, stride, dims, tokens), down, WIDE, PRECISION)
        given = tl.dot(scores.to(right.dtype), right, input_precision=PRECISION)
        found += up * given
        own = load_rows(a, first, lanes, a_stride, dims, tokens)
        moved += given * under_decay(own, up * share[:, None], WIDE, PRECISION).to(tl.float32)
    return found, moved


@triton.jit
def sum_over_readers(
    found, moved, x, change, a, k, g, first, rows, end, strict, share, levels, dims, x_stride, a_stride, stride,
    value_stride, tokens, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For every key j sum_i share_i (u_j . x_i) exp(G_i - G_j) a_i over later readers of a halved chunk, added.

    And its products with k_j, which pass over no decay, taken from `moved`.
    """
    for level in range(0, levels + 1):
        lanes = rows + (level >> 3)
        pairs, middle = level_pairs(lanes, 6 - level, level == levels, False, False)
        scores = products(change, x, first, lanes, value_stride, x_stride, tokens, V, BV, C, PRECISION)
        scores = tl.where(pairs & seen_later(end, lanes, strict), scores, 0.0)
        up, down = level_factors(g, first, lanes, middle, stride, dims, tokens)
        right = load_rows(a, first, lanes, a_stride, dims, tokens)
        right = under_decay(right, up * share[:, None], WIDE, PRECISION)
        given = tl.dot(scores.to(right.dtype), right, input_precision=PRECISION)
        found += down * given
        own = under_decay(load_rows(k, first, lanes, stride, dims, tokens), down, WIDE, PRECISION)
        moved -= given * own.to(tl.float32)
    return found, moved


@triton.jit(do_not_specialize=["tokens", "chunks", "batches"])
def key_sums_kernel(
    q, k, do, beta, log_decay, docs, halved, states, leaving, change, missing, direct, dq, dk, dbeta, dlog_decay,
    tokens, chunks, batches,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, HALVED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the decays' gradient of one chunk of one head of the state, BK columns a program.

    `dbeta` is [K // BK, B, T, M], of which the first tile adds `direct` [PARTS, B, T, M]. Of the two launches one makes
    the chunks that are not halved, the other (HALVED) those that are.
    """
    tiles: tl.constexpr = K // BK
    group: tl.constexpr = heads // state_heads
    tile = tl.program_id(0) % tiles
    chunk = (tl.program_id(0) // tiles) % chunks
    row_head = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    at = row_head * chunks + chunk
    often = tl.load(halved + at)
    mine = often != 0 if HALVED else often == 0
    if mine:
        stride: tl.constexpr = state_heads * K
        value_stride: tl.constexpr = state_heads * V
        keys_of_head = (batch * tokens * state_heads + head) * K
        values_of_head = (batch * tokens * state_heads + head) * V
        k += keys_of_head
        log_decay += keys_of_head
        change += values_of_head
        missing += values_of_head
        states += at * K * V
        leaving += at * K * V
        first = chunk * C
        rows, dims = tl.arange(0, C), tile * BK + tl.arange(0, BK)
        begin, end, entering, open_end = load_bounds(docs, batch, first, rows, tokens, C)
        strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
        if not HALVED:
            up, early = block_factors(log_decay, first, rows, stride, dims, tokens, C)
            right = under_decay(load_rows(k, first, rows, stride, dims, tokens), 1.0 / up, WIDE, PRECISION)
        # loops of more than one turn, whose addresses and masks leave the registers again
        moved = tl.zeros([C, BK], tl.float32)
        for_key = tl.zeros([C, BK], tl.float32)
        for turn in range(group + 1):
            # what reads: the queries, one head after the other, then the keys
            x, y, x_stride, y_stride = reader(
                q, k, do, missing, turn, batch * tokens * heads + head * group, heads, state_heads, K, V
            )
            share = tl.where(turn < group, tl.full([C], 1.0, tl.float32), -strength)
            found = through_state(y, states, first, rows, y_stride, dims, tokens, V, BV, C, BK, PRECISION)
            if HALVED:
                found *= start_rows(log_decay, first, rows, stride, dims, tokens) * entering[:, None]
                own = load_rows(x, first, rows, x_stride, dims, tokens).to(tl.float32)
                moved += found * own * share[:, None]
                found, moved = sum_over_writers(
                    found, moved, y, change, x, k, log_decay, first, rows, begin, turn // group, share, often, dims,
                    y_stride, x_stride, stride, value_stride, tokens, V, BV, C, WIDE, PRECISION,
                )  # fmt: skip
            else:
                found = found * early[None, :] * entering[:, None]
                scores = products(y, change, first, rows, y_stride, value_stride, tokens, V, BV, C, PRECISION)
                scores = tl.where(sees_earlier(begin, rows, turn // group), scores, 0.0)
                found = tl.dot(scores.to(right.dtype), right, found, input_precision=PRECISION)
                own = load_rows(x, first, rows, x_stride, dims, tokens)
                moved += found * under_decay(own, up * share[:, None], WIDE, PRECISION).to(tl.float32)
                found *= up
            if turn < group:
                to = dq + (batch * tokens * heads + head * group + turn) * K
                store_rows(to, first, rows, heads * K, dims, tokens, found)
            else:
                product = found * load_rows(x, first, rows, x_stride, dims, tokens).to(tl.float32)
                for_strength = -tl.sum(product, 1)
                if tile == 0:
                    for source in tl.static_range(PARTS):
                        apart = batches * tl.cast(source, tl.int64) * state_heads * tokens
                        for_strength += load_scalars(
                            direct + apart, batch, first, rows, tokens, state_heads, head
                        )
                apart = batches * tl.cast(tile, tl.int64) * state_heads * tokens
                store_scalars(dbeta + apart, batch, first, rows, tokens, state_heads, head, for_strength)
            for_key = found * share[:, None]
        # always `rows`, but the compiler does not know it, and makes again what it would keep in registers
        rows = rows + (chunks >> 31)
        # keys as they are written: read behind the chunk, then by its queries and by later keys of it
        written = through_state(
            change, leaving, first, rows, value_stride, dims, tokens, V, BV, C, BK, PRECISION
        )
        written *= end_rows(log_decay, first, rows, stride, dims, tokens, C) * open_end[:, None]
        for_key += written
        written *= load_rows(k, first, rows, stride, dims, tokens).to(tl.float32)
        moved -= written
        through = tl.sum(written, 0)
        before, after = load_ends(docs, batch, first, tokens, C)
        if before == after:
            shared = tl.zeros([BK], tl.float32)
            for piece in range(V // BV):
                values = piece * BV + tl.arange(0, BV)
                square = dims[None, :] * V + values[:, None]
                shared += tl.sum(
                    tl.load(states + square).to(tl.float32) * tl.load(leaving + square).to(tl.float32), 0
                )
            whole = tl.sum(in_base_two(load_rows(log_decay, first, rows, stride, dims, tokens)), 0)
            through += shared * tl.exp2(whole)
        rows = rows + (batches >> 31)
        if not HALVED:
            up, _ = block_factors(log_decay, first, rows, stride, dims, tokens, C)
        # an accumulator of its own: one that is read between two products came out wrong on Hopper (Triton 3.6)
        inside = tl.zeros([C, BK], tl.float32)
        for turn in range(group + 1):
            x, y, x_stride, y_stride = reader(
                q, k, do, missing, turn, batch * tokens * heads + head * group, heads, state_heads, K, V
            )
            share = tl.where(turn < group, tl.full([C], 1.0, tl.float32), -strength)
            if HALVED:
                inside, moved = sum_over_readers(
                    inside, moved, y, change, x, k, log_decay, first, rows, end, turn // group, share, often, dims,
                    y_stride, x_stride, stride, value_stride, tokens, V, BV, C, WIDE, PRECISION,
                )  # fmt: skip
            else:
                scores = products(change, y, first, rows, value_stride, y_stride, tokens, V, BV, C, PRECISION)
                scores = tl.where(seen_later(end, rows, turn // group), scores, 0.0)
                reading = load_rows(x, first, rows, x_stride, dims, tokens)
                reading = under_decay(reading, up * share[:, None], WIDE, PRECISION)
                inside = tl.dot(scores.to(reading.dtype), reading, inside, input_precision=PRECISION)
        rows = rows + ((tokens + batches) >> 31)
        if not HALVED:
            up, _ = block_factors(log_decay, first, rows, stride, dims, tokens, C)
            down = 1.0 / up
            own = under_decay(load_rows(k, first, rows, stride, dims, tokens), down, WIDE, PRECISION)
            moved -= inside * own.to(tl.float32)
            inside *= down
        store_rows(dk + keys_of_head, first, rows, stride, dims, tokens, for_key + inside)
        found = tl.cumsum(moved, 0, reverse=True) + through[None, :]
        store_rows(dlog_decay + keys_of_head, first, rows, stride, dims, tokens, found)
