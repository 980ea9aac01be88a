"""What the queries want of each chunk's state, and the gradients that go along the values.

In the letters of `triton_forward`, with E the gradient of the state that leaves a chunk:

    dU = [q, b]^T dO + B E,   dR = T^T dU,   dV = M^T dO + K E + X^T B E,   dS = kept E + P^T E + Y^T dO,

where R = [a, k] V + A S, of which U = T R. Since (I - [a, b]) U = R, the gradient of [a, b] is dR U^T: that of T is
never needed. U and dR are written for `triton_gradients`, which needs both as they stand and transposed.

Sums of log decays are made once, by the first of the three kernels: a scan is some hundred instructions, and the others
would need nine of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_rows, store_rows
from linearize.kernels.gated_linear.triton_levels import in_base_two, row_exponents
from linearize.kernels.generalized_delta.triton_common import chunk_documents, since_start, until_end


@triton.jit(do_not_specialize=["tokens", "chunks"])
def reader_kernel(
    do, g, reading, states, sums, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y^T dO of one chunk of one head of the state, summed over its queries: columns of `states`.

    And into `sums` [B, M, chunks, C + 1, K] the log decays, base 2, from the chunk's middle up to each token: up to but
    without token i in row i, so that the first row is the start and the last one the end.
    """
    parts: tl.constexpr = V // BV
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    first = chunk * C
    rows, values = tl.arange(0, C), part * BV + tl.arange(0, BV)
    for block in range(K // BK):
        dims = block * BK + tl.arange(0, BK)
        wanted = tl.zeros([BK, BV], tl.float32)
        for member in range(group):
            reader = head * group + member
            y = load_rows(do + (batch * tokens * heads + reader) * V, first, rows, heads * V, values, tokens)
            own = reading + ((batch * heads + reader) * chunks + chunk) * C * K
            x = tl.load(own + rows[None, :] * K + dims[:, None])
            wanted = tl.dot(x, y, wanted, input_precision=PRECISION)
        at = row_head * chunks + chunk
        to = states + at * K * V + dims[:, None] * V + values[None, :]
        tl.store(to, wanted.to(states.dtype.element_ty))
        if part == 0:
            own = g + (batch * tokens * state_heads + head) * K
            decays = in_base_two(load_rows(own, first, rows, state_heads * K, dims, tokens))
            passed, early = row_exponents(decays, rows, C)
            column = sums + at * (C + 1) * K + dims
            tl.store(column, -early)
            tl.store(column[None, :] + (rows + 1)[:, None] * K, passed)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def change_kernel(
    k, v, a, b, sums, docs, do, weights, inverse, solved, moved, states, leaving, change, missing, dv, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of U into `change`, of dR into `missing` and of dV, [B, T, M, V], of one chunk of one head."""
    parts: tl.constexpr = V // BV
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    of_keys = (batch * tokens * state_heads + head) * K
    of_values = (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, values = tl.arange(0, C), part * BV + tl.arange(0, BV)
    stride: tl.constexpr = state_heads * K
    kind = k.dtype.element_ty
    _begin, _end, entering, open_after, _whole = chunk_documents(docs, batch, first, rows, tokens)
    at = row_head * chunks + chunk
    sums += at * (C + 1) * K
    square = at * C * C + rows[:, None] * C + rows[None, :]
    turned = at * C * C + rows[None, :] * C + rows[:, None]
    held = tl.zeros([C, BV], tl.float32)
    # of B E the negative: a difference is not made one with the product before it, whose result is read in between
    less = tl.zeros([C, BV], tl.float32)
    for_value = tl.zeros([C, BV], tl.float32)
    for block in range(K // BK):
        dims = block * BK + tl.arange(0, BK)
        place = at * K * V + dims[:, None] * V + values[None, :]
        x = load_rows(a + of_keys, first, rows, stride, dims, tokens).to(tl.float32)
        x = (x * since_start(sums, rows, dims, K, True) * entering[:, None]).to(kind)
        held = tl.dot(x, tl.load(states + place), held, input_precision=PRECISION)
        ahead = tl.load(leaving + place)
        onward = until_end(sums, rows, dims, K) * open_after[:, None]
        y = load_rows(b + of_keys, first, rows, stride, dims, tokens).to(tl.float32) * onward
        less = tl.dot((-y).to(kind), ahead, less, input_precision=PRECISION)
        z = load_rows(k + of_keys, first, rows, stride, dims, tokens).to(tl.float32) * onward
        z = z.to(kind)
        for_value = tl.dot(z, ahead, for_value, input_precision=PRECISION)
    value = load_rows(v + of_values, first, rows, state_heads * V, values, tokens)
    found = tl.dot(tl.load(solved + square), value, input_precision=PRECISION)
    found = tl.dot(tl.load(inverse + square), held.to(kind), found, input_precision=PRECISION)
    store_rows(change + of_values, first, rows, state_heads * V, values, tokens, found)
    for_change = tl.zeros([C, BV], tl.float32)
    for member in range(group):
        reader = head * group + member
        given = load_rows(do + (batch * tokens * heads + reader) * V, first, rows, heads * V, values, tokens)
        own = ((batch * heads + reader) * chunks + chunk) * C * C + rows[None, :] * C + rows[:, None]
        for_value = tl.dot(tl.load(weights + own), given, for_value, input_precision=PRECISION)
        for_change = tl.dot(tl.load(moved + own), given, for_change, input_precision=PRECISION)
    wanted = (for_change - less).to(kind)
    wanted = tl.dot(tl.load(inverse + turned), wanted, input_precision=PRECISION)
    store_rows(missing + of_values, first, rows, state_heads * V, values, tokens, wanted)
    moved_back = tl.dot(tl.load(solved + turned), less.to(kind), input_precision=PRECISION)
    store_rows(dv + of_values, first, rows, state_heads * V, values, tokens, for_value - moved_back)
