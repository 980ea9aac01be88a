"""`triton_forward.transition_kernel` for heads of one tile of keys and chunks that are not halved: what training meets.

Sums of decays are made once, along rows and along columns, and tiles under their decays wait in 16 bits for the
products that read them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_columns, load_rows, store_rows
from linearize.kernels.gated_linear.triton_levels import (
    column_exponents,
    count_halvings,
    in_base_two,
    row_exponents,
    strongest,
)
from linearize.kernels.generalized_delta.triton_common import chunk_documents, earlier, met
from linearize.kernels.generalized_delta.triton_forward import store_square
from linearize.kernels.generalized_delta.triton_inverse import unit_inverse
from linearize.kernels.generalized_delta.triton_products import scaled


@triton.jit(do_not_specialize=["tokens", "chunks"])
def whole_transition_kernel(
    q, k, v, a, b, g, docs, halved, kept, removal, states, weights, reading, inverse, solved, moved, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of one chunk of one head; BK is K. Marks the chunks that it leaves to the other kernel in `halved`."""
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, BK)
    stride: tl.constexpr = state_heads * K
    of_keys = (batch * tokens * state_heads + head) * K
    g += of_keys
    at = row_head * chunks + chunk
    decays = in_base_two(load_rows(g, first, rows, stride, dims, tokens))
    token, half = strongest(decays, rows, C)
    often = count_halvings(token, half)
    tl.store(halved + at, often)
    if often == 0:
        k += of_keys
        a += of_keys
        b += of_keys
        v += (batch * tokens * state_heads + head) * V
        group: tl.constexpr = heads // state_heads
        kind = k.dtype.element_ty
        begin, _end, entering, leaving, unbroken = chunk_documents(docs, batch, first, rows, tokens)
        tl.store(kept + at * K + dims, tl.exp2(tl.sum(decays, 0)) * unbroken)
        # columns: writers with the decay to the middle, as readers of the chunk meet them, and to the end
        behind = column_exponents(in_base_two(load_columns(g, first, rows, stride, dims, tokens)), rows, C)
        until = tl.exp2(tl.minimum(tl.min(behind, 1)[:, None] - behind, 0.0)) * leaving[None, :]
        behind = tl.exp2(-behind)
        column = load_columns(b, first, rows, stride, dims, tokens)
        near_b, far_b = scaled(column, behind, WIDE), scaled(column, until, False)
        column = load_columns(k, first, rows, stride, dims, tokens)
        near_k, far_k = scaled(column, behind, WIDE), scaled(column, until, False)
        # rows: readers
        passed, early = row_exponents(decays, rows, C)
        reader = load_rows(a, first, rows, stride, dims, tokens)
        since = met(passed, g, first, rows, stride, dims, tokens, True)
        near_a = scaled(reader, tl.exp2(since), WIDE)
        since = tl.exp2(tl.minimum(since + early[None, :], 0.0)) * entering[:, None]
        far_a = scaled(reader, since, False)
        with_b = tl.dot(near_a, near_b, input_precision=PRECISION)
        before = earlier(begin, rows, 1)
        solve = unit_inverse(tl.where(before, -with_b, 0.0), PRECISION).to(kind)
        with_k = tl.dot(near_a, near_k, input_precision=PRECISION)
        change = tl.where(before, with_k, 0.0).to(kind)
        change = tl.dot(solve, change, input_precision=PRECISION).to(kind)
        if SAVE:
            store_square(inverse + at * C * C, rows, solve)
            store_square(solved + at * C * C, rows, change)
        finder = tl.dot(solve, far_a, input_precision=PRECISION).to(kind)
        taken = tl.dot(far_b, finder, input_precision=PRECISION)
        tl.store(removal + at * K * K + dims[:, None] * K + dims[None, :], taken.to(kind))
        for piece in range(V // BV):
            values = piece * BV + tl.arange(0, BV)
            value = load_rows(v, first, rows, state_heads * V, values, tokens)
            fresh = tl.dot(change, value, input_precision=PRECISION).to(kind)
            written = tl.dot(far_k, value, input_precision=PRECISION)
            written = tl.dot(far_b, fresh, written, input_precision=PRECISION)
            tl.store(states + at * K * V + dims[:, None] * V + values[None, :], written.to(kind))
        for member in range(group):
            own = batch * heads + head * group + member
            query = load_rows(
                q + (batch * tokens * heads + head * group + member) * K, first, rows, heads * K, dims, tokens
            )
            near_q = scaled(query, tl.exp2(passed), WIDE)
            seen = earlier(begin, rows, 0)
            through = tl.dot(near_q, near_b, input_precision=PRECISION)
            through = tl.where(seen, through, 0.0).to(kind)
            direct = tl.dot(near_q, near_k, input_precision=PRECISION)
            weight = tl.dot(through, change, tl.where(seen, direct, 0.0), input_precision=PRECISION)
            store_square(weights + (own * chunks + chunk) * C * C, rows, weight)
            if SAVE:
                store_square(moved + (own * chunks + chunk) * C * C, rows, through)
            whole = tl.exp2(tl.minimum(passed + early[None, :], 0.0)) * entering[:, None]
            read = tl.dot(through, finder, query.to(tl.float32) * whole, input_precision=PRECISION)
            store_rows(reading + (own * chunks + chunk) * C * K, 0, rows, K, dims, C, read)
