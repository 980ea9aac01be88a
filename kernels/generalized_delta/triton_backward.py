"""What the queries want of each chunk's state, and the gradients that go along the values.

In the letters of `triton_forward`, with E the gradient of the state that leaves a chunk:

    dU = [q, b]^T dO + B E,   dR = T^T dU,   dV = M^T dO + K E + X^T B E,   dS = kept E + P^T E + Y^T dO,

where R = [a, k] V + A S, of which U = T R. Since (I - [a, b]) U = R, the gradient of [a, b] is dR U^T: that of T is
never needed. U and dR are written for `triton_gradients`, which needs both as they stand and transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_rows, store_rows
from linearize.kernels.generalized_delta.triton_common import chunk_documents, entered, left


@triton.jit(do_not_specialize=["tokens", "chunks"])
def reader_kernel(
    do, reading, states, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y^T dO of one chunk of one head of the state, summed over its queries: columns of `states`."""
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
        to = states + (row_head * chunks + chunk) * K * V + dims[:, None] * V + values[None, :]
        tl.store(to, wanted.to(states.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def change_kernel(
    k, v, a, b, g, docs, do, weights, inverse, solved, moved, states, leaving, change, missing, dv, tokens, chunks,
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
    g += of_keys
    kind = k.dtype.element_ty
    _begin, _end, entering, open_after, _whole = chunk_documents(docs, batch, first, rows, tokens)
    at = row_head * chunks + chunk
    square = at * C * C + rows[:, None] * C + rows[None, :]
    turned = at * C * C + rows[None, :] * C + rows[:, None]
    held = tl.zeros([C, BV], tl.float32)
    # of B E the negative: a difference is not made one with the product before it, whose result is read in between
    less = tl.zeros([C, BV], tl.float32)
    for_value = tl.zeros([C, BV], tl.float32)
    for block in range(K // BK):
        dims = block * BK + tl.arange(0, BK)
        place = at * K * V + dims[:, None] * V + values[None, :]
        x = entered(a + of_keys, g, entering, first, rows, stride, stride, dims, tokens, True).to(kind)
        held = tl.dot(x, tl.load(states + place), held, input_precision=PRECISION)
        ahead = tl.load(leaving + place)
        y = left(b + of_keys, g, open_after, first, rows, stride, dims, tokens)
        less = tl.dot((-y).to(kind), ahead, less, input_precision=PRECISION)
        z = left(k + of_keys, g, open_after, first, rows, stride, dims, tokens).to(kind)
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
