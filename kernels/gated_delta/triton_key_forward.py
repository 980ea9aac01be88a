"""The forward pass with a decay for every key dimension: pairs, T, what each chunk does to the state, its output.

Only the pairs of tokens in a chunk need decays between tokens, A of keys with keys and M of queries with keys. One
kernel makes both and writes them; everything else scales keys and queries by decays to the chunk's ends.
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
)
from linearize.kernels.gated_delta.triton_inverse import store_inverse
from linearize.kernels.gated_delta.triton_key_common import (
    end_columns,
    halved_pairs,
    halvings_of,
    load_bounds,
    sees_earlier,
    start_rows,
    whole_pairs,
)
from linearize.kernels.gated_linear.triton_levels import column_exponents, in_base_two, row_exponents


@triton.jit(do_not_specialize=["tokens", "chunks"])
def key_pairs_kernel(
    q, k, beta, log_decay, docs, halved, pairs, weights, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    HALVED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A of one chunk of one head into `pairs`, on and below its diagonal blocks of 16, and M of its queries.

    Both are [C, C] a chunk. A first launch makes the chunks that need no halving and marks the others in `halved`
    [B, M, chunks]; a second one (HALVED), whose programs need more registers, makes those.
    """
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    at = row_head * chunks + chunk
    group: tl.constexpr = heads // state_heads
    stride: tl.constexpr = state_heads * K
    k += (batch * tokens * state_heads + head) * K
    log_decay += (batch * tokens * state_heads + head) * K
    first = chunk * C
    rows = tl.arange(0, C)
    if HALVED:
        often = tl.load(halved + at)
        mine = often != 0
    else:
        often = halvings_of(log_decay, first, rows, stride, tokens, K, BK, C)
        mine = often == 0
        tl.store(halved + at, often)
    if mine:
        operand: tl.constexpr = tl.float32 if WIDE else k.dtype.element_ty
        square = rows[:, None] * C + rows[None, :]
        begin, _, _, _ = load_bounds(docs, batch, first, rows, tokens, C)
        strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
        dims = tl.arange(0, K)
        if HALVED:
            found = halved_pairs(
                k, k, log_decay, first, rows, stride, stride, tokens, often, K, BK, C, operand, PRECISION
            )
        elif K > BK:
            found = whole_pairs(
                k, k, log_decay, first, rows, stride, stride, tokens, K, BK, C, operand, PRECISION
            )
        else:
            # queries meet the same scaled keys as keys do
            decays = in_base_two(load_rows(log_decay, first, rows, stride, dims, tokens))
            passed, _ = row_exponents(decays, rows, C)
            up = tl.exp2(passed)
            decays = in_base_two(load_columns(log_decay, first, rows, stride, dims, tokens))
            passed = column_exponents(decays, rows, C)
            other = load_columns(k, first, rows, stride, dims, tokens).to(tl.float32) * tl.exp2(-passed)
            other = other.to(operand)
            own = load_rows(k, first, rows, stride, dims, tokens).to(tl.float32) * up
            found = tl.dot(own.to(operand), other, input_precision=PRECISION)
        found = tl.where(sees_earlier(begin, rows, 1), found * strength[:, None], 0.0)
        # whole blocks of 16, so that a thread's neighbours are written together
        needed = rows[:, None] // 16 >= rows[None, :] // 16
        tl.store(pairs + at * C * C + square, found.to(pairs.dtype.element_ty), mask=needed)
        for member in range(group):
            reader = head * group + member
            x = q + (batch * tokens * heads + reader) * K
            if HALVED:
                found = halved_pairs(
                    x,
                    k,
                    log_decay,
                    first,
                    rows,
                    heads * K,
                    stride,
                    tokens,
                    often,
                    K,
                    BK,
                    C,
                    operand,
                    PRECISION,
                )
            elif K > BK:
                found = whole_pairs(
                    x, k, log_decay, first, rows, heads * K, stride, tokens, K, BK, C, operand, PRECISION
                )
            else:
                own = load_rows(x, first, rows, heads * K, dims, tokens).to(tl.float32) * up
                found = tl.dot(own.to(operand), other, input_precision=PRECISION)
            found = tl.where(sees_earlier(begin, rows, 0), found, 0.0)
            to = weights + ((batch * heads + reader) * chunks + chunk) * C * C + square
            tl.store(to, found.to(weights.dtype.element_ty))


@triton.jit
def load_tile(x, row, column):
    place = (row * 16 + tl.arange(0, 16))[:, None] * 64 + (column * 16 + tl.arange(0, 16))[None, :]
    return tl.load(x + place).to(tl.float32)


@triton.jit
def key_inverse_kernel(pairs, inverse, PRECISION: tl.constexpr):
    """T [64, 64] of one chunk from its A."""
    at = tl.program_id(0).to(tl.int64) * 64 * 64
    a = pairs + at
    store_inverse(
        inverse + at, load_tile(a, 0, 0), load_tile(a, 1, 0), load_tile(a, 1, 1), load_tile(a, 2, 0),
        load_tile(a, 2, 1), load_tile(a, 2, 2), load_tile(a, 3, 0), load_tile(a, 3, 1), load_tile(a, 3, 2),
        load_tile(a, 3, 3), PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "chunks"])
def key_transition_kernel(
    k, v, beta, log_decay, docs, inverse, removal, states, kept, tokens, chunks,
    state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-P = -K_e^T T (beta K_s) [K, K] and N = K_e^T T (beta V) [K, V] of one chunk, and its decay `kept` [K].

    K_s are the keys with the decays since the chunk's start, K_e with those to its end.
    """
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    stride: tl.constexpr = state_heads * K
    k += (batch * tokens * state_heads + head) * K
    log_decay += (batch * tokens * state_heads + head) * K
    v += (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    kind = k.dtype.element_ty
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    _, _, entering, leaving = load_bounds(docs, batch, first, rows, tokens, C)
    before, after = load_ends(docs, batch, first, tokens, C)
    at = row_head * chunks + chunk
    solve = tl.load(inverse + at * C * C + rows[:, None] * C + rows[None, :]).to(tl.float32)
    weighted = (solve * strength[None, :]).to(kind)
    writers = load_columns(k, first, rows, stride, dims, tokens).to(tl.float32)
    writers *= end_columns(log_decay, first, rows, stride, dims, tokens, C) * leaving[None, :]
    writers = writers.to(kind)
    for block in range(K // BK):
        columns = block * BK + tl.arange(0, BK)
        decays = in_base_two(load_rows(log_decay, first, rows, stride, columns, tokens))
        whole = tl.where(before == after, tl.exp2(tl.sum(decays, 0)), 0.0)
        tl.store(kept + at * K + columns, whole)
        reading = load_rows(k, first, rows, stride, columns, tokens).to(tl.float32)
        reading *= tl.exp2(tl.cumsum(decays, 0)) * entering[:, None]
        held = -tl.dot(weighted, reading.to(kind), input_precision=PRECISION)
        found = tl.dot(writers, held.to(kind), input_precision=PRECISION)
        tl.store(removal + at * K * K + dims[:, None] * K + columns[None, :], found.to(kind))
    for block in range(V // BV):
        columns = block * BV + tl.arange(0, BV)
        right = load_rows(v, first, rows, state_heads * V, columns, tokens)
        fresh = tl.dot(weighted, right, input_precision=PRECISION)
        found = tl.dot(writers, fresh.to(kind), input_precision=PRECISION)
        tl.store(states + at * K * V + dims[:, None] * V + columns[None, :], found.to(kind))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def key_output_kernel(
    q, k, v, beta, log_decay, docs, inverse, weights, states, out, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of the output of one chunk, of every query head that reads one head of the state."""
    parts: tl.constexpr = V // BV
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    stride: tl.constexpr = state_heads * K
    k += (batch * tokens * state_heads + head) * K
    log_decay += (batch * tokens * state_heads + head) * K
    v += (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, values = tl.arange(0, C), part * BV + tl.arange(0, BV)
    kind = k.dtype.element_ty
    square = rows[:, None] * C + rows[None, :]
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    _, _, entering, _ = load_bounds(docs, batch, first, rows, tokens, C)
    at = row_head * chunks + chunk
    dims = tl.arange(0, BK)
    reach = start_rows(log_decay, first, rows, stride, dims, tokens) * entering[:, None]
    held = tl.zeros([C, BV], tl.float32)
    for piece in range(K // BK):
        dims = piece * BK + tl.arange(0, BK)
        if K > BK:
            reach = start_rows(log_decay, first, rows, stride, dims, tokens) * entering[:, None]
        reading = load_rows(k, first, rows, stride, dims, tokens).to(tl.float32) * reach
        state = tl.load(states + at * K * V + dims[:, None] * V + values[None, :])
        held = tl.dot(reading.to(kind), state, held, input_precision=PRECISION)
    value = load_rows(v, first, rows, state_heads * V, values, tokens).to(tl.float32)
    missing = (strength[:, None] * (value - held)).to(kind)
    solve = tl.load(inverse + at * C * C + square)
    change = tl.dot(solve, missing, input_precision=PRECISION).to(kind)
    for member in range(group):
        reader = head * group + member
        line = batch * tokens * heads + reader
        seen = tl.load(weights + ((batch * heads + reader) * chunks + chunk) * C * C + square)
        result = tl.dot(seen, change, input_precision=PRECISION)
        for piece in range(K // BK):
            dims = piece * BK + tl.arange(0, BK)
            if K > BK:
                reach = start_rows(log_decay, first, rows, stride, dims, tokens) * entering[:, None]
            x = load_rows(q + line * K, first, rows, heads * K, dims, tokens).to(tl.float32) * reach
            state = tl.load(states + at * K * V + dims[:, None] * V + values[None, :])
            result = tl.dot(x.to(kind), state, result, input_precision=PRECISION)
        store_rows(out + line * V, first, rows, heads * V, values, tokens, result)
