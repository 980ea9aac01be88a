"""What each chunk does to the state and how its queries read it, then the outputs; all chunks side by side.

With [x, y] the products of the readers x of a chunk with its writers y under the decay between them, A and Q the
readers with the decay since the chunk's start, and B and K the writers with that to its end, the u of a chunk are

    U = T ([a, k] V + A S),   T = (I - [a, b])^-1,

and with X = T [a, k] and W = T A the chunk takes S to kept S + P S + N and gives O = M V + Y S, where

    P = B^T W,   N = K^T V + B^T X V,   M = [q, k] + [q, b] X,   Y = Q + [q, b] W.

Neither M nor Y knows the state, so the outputs are two products, and the mirrored loop begins with Y^T dO.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_rows, store_rows
from linearize.kernels.gated_linear.triton_levels import halvings, in_base_two
from linearize.kernels.generalized_delta.triton_common import (
    chunk_documents,
    earlier,
    entered,
    turned_left,
)
from linearize.kernels.generalized_delta.triton_inverse import unit_inverse
from linearize.kernels.generalized_delta.triton_products import halved_products, products


@triton.jit
def store_square(to, rows, tile):
    """A [C, C] tile."""
    C: tl.constexpr = rows.shape[0]
    tl.store(to + rows[:, None] * C + rows[None, :], tile.to(to.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def transition_kernel(
    q, k, v, a, b, g, docs, halved, kept, removal, states, weights, reading, inverse, solved, moved, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, HALVED: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk of one head of the state: kept [B, M, chunks, K], P [.., K, K] and N [.., K, V] into `states`.

    Of its queries M [B, H, chunks, C, C] into `weights` and Y [B, H, chunks, C, K] into `reading`. SAVE, for the
    gradients: T into `inverse`, X into `solved` [B, M, chunks, C, C], [q, b] into `moved` [B, H, chunks, C, C].

    A first launch makes the chunks that need no halving and marks the others in `halved` [B, M, chunks]; a second one
    (HALVED) makes those.
    """
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    first = chunk * C
    rows = tl.arange(0, C)
    stride: tl.constexpr = state_heads * K
    of_keys = (batch * tokens * state_heads + head) * K
    g += of_keys
    at = row_head * chunks + chunk
    if HALVED:
        often = tl.load(halved + at)
        mine = often != 0
    else:
        often = halvings(g, first, rows, tokens, state_heads, K, BK, C)
        mine = often == 0
        tl.store(halved + at, often)
    if mine:
        k += of_keys
        a += of_keys
        b += of_keys
        v += (batch * tokens * state_heads + head) * V
        group: tl.constexpr = heads // state_heads
        kind = k.dtype.element_ty
        begin, _end, entering, leaving, unbroken = chunk_documents(docs, batch, first, rows, tokens)
        if HALVED:
            with_b = halved_products(
                a, b, g, first, rows, stride, stride, tokens, often, K, BK, True, WIDE, PRECISION
            )
            with_k = halved_products(
                a, k, g, first, rows, stride, stride, tokens, often, K, BK, True, WIDE, PRECISION
            )
        else:
            with_b, with_k = products(
                a, b, k, g, first, rows, stride, stride, tokens, K, BK, True, WIDE, PRECISION
            )
        tl.debug_barrier()
        before = earlier(begin, rows, 1)
        solve = unit_inverse(tl.where(before, -with_b, 0.0), PRECISION).to(kind)
        change = tl.where(before, with_k, 0.0).to(kind)
        change = tl.dot(solve, change, input_precision=PRECISION).to(kind)
        if SAVE:
            store_square(inverse + at * C * C, rows, solve)
            store_square(solved + at * C * C, rows, change)
        tl.debug_barrier()
        for column in range(K // BK):
            columns = column * BK + tl.arange(0, BK)
            reader = entered(a, g, entering, first, rows, stride, stride, columns, tokens, True).to(kind)
            found = tl.dot(solve, reader, input_precision=PRECISION).to(kind)
            for row in range(K // BK):
                dims = row * BK + tl.arange(0, BK)
                writer = turned_left(b, g, leaving, first, rows, stride, dims, tokens).to(kind)
                taken = tl.dot(writer, found, input_precision=PRECISION)
                to = removal + at * K * K + dims[:, None] * K + columns[None, :]
                tl.store(to, taken.to(kind))
        tl.debug_barrier()
        for piece in range(V // BV):
            values = piece * BV + tl.arange(0, BV)
            value = load_rows(v, first, rows, state_heads * V, values, tokens)
            fresh = tl.dot(change, value, input_precision=PRECISION).to(kind)
            for row in range(K // BK):
                dims = row * BK + tl.arange(0, BK)
                writer = turned_left(k, g, leaving, first, rows, stride, dims, tokens).to(kind)
                written = tl.dot(writer, value, input_precision=PRECISION)
                mover = turned_left(b, g, leaving, first, rows, stride, dims, tokens).to(kind)
                written = tl.dot(mover, fresh, written, input_precision=PRECISION)
                tl.store(states + at * K * V + dims[:, None] * V + values[None, :], written.to(kind))
        tl.debug_barrier()
        for member in range(group):
            own = batch * heads + head * group + member
            query = q + (batch * tokens * heads + head * group + member) * K
            if HALVED:
                of_b = halved_products(
                    query, b, g, first, rows, heads * K, stride, tokens, often, K, BK, False, WIDE, PRECISION
                )
                of_k = halved_products(
                    query, k, g, first, rows, heads * K, stride, tokens, often, K, BK, False, WIDE, PRECISION
                )
            else:
                of_b, of_k = products(
                    query, b, k, g, first, rows, heads * K, stride, tokens, K, BK, False, WIDE, PRECISION
                )
            seen = earlier(begin, rows, 0)
            through = tl.where(seen, of_b, 0.0).to(kind)
            weight = tl.dot(through, change, tl.where(seen, of_k, 0.0), input_precision=PRECISION)
            store_square(weights + (own * chunks + chunk) * C * C, rows, weight)
            if SAVE:
                store_square(moved + (own * chunks + chunk) * C * C, rows, through)
            for block in range(K // BK):
                parts = block * BK + tl.arange(0, BK)
                finder = entered(a, g, entering, first, rows, stride, stride, parts, tokens, True).to(kind)
                finder = tl.dot(solve, finder, input_precision=PRECISION).to(kind)
                read = entered(query, g, entering, first, rows, heads * K, stride, parts, tokens, False)
                read = tl.dot(through, finder, read, input_precision=PRECISION)
                store_rows(reading + (own * chunks + chunk) * C * K, 0, rows, K, parts, C, read)
        for block in range(K // BK):
            parts = block * BK + tl.arange(0, BK)
            decays = in_base_two(load_rows(g, first, rows, stride, parts, tokens))
            tl.store(kept + at * K + parts, tl.exp2(tl.sum(decays, 0)) * unbroken)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def output_kernel(
    v, weights, reading, states, out, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = M V + Y S: columns of one chunk of one query head."""
    parts: tl.constexpr = V // BV
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    own = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, reader = own // heads, own % heads
    head = reader // (heads // state_heads)
    first = chunk * C
    rows, values = tl.arange(0, C), part * BV + tl.arange(0, BV)
    weights += (own * chunks + chunk) * C * C
    reading += (own * chunks + chunk) * C * K
    states += ((batch * state_heads + head) * chunks + chunk) * K * V
    value = load_rows(
        v + (batch * tokens * state_heads + head) * V, first, rows, state_heads * V, values, tokens
    )
    weight = tl.load(weights + rows[:, None] * C + rows[None, :])
    result = tl.dot(weight, value, input_precision=PRECISION)
    for block in range(K // BK):
        dims = block * BK + tl.arange(0, BK)
        read = tl.load(reading + rows[:, None] * K + dims[None, :])
        state = tl.load(states + dims[:, None] * V + values[None, :])
        result = tl.dot(read, state, result, input_precision=PRECISION)
    to = out + (batch * tokens * heads + reader) * V
    store_rows(to, first, rows, heads * V, values, tokens, result)
