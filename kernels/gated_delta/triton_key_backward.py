"""What queries want of each chunk, and the gradients of its changes, with a decay for every key dimension.

The names are those of `triton_backward`, with K_s, K_e and Q_s keys and queries under the decays to the chunk's ends;
M^T comes out of memory, where the forward pass has put M.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import (
    load_columns,
    load_rows,
    load_scalars,
    store_rows,
    store_scalars,
)
from linearize.kernels.gated_delta.triton_key_common import end_rows, load_bounds, start_columns, start_rows


@triton.jit(do_not_specialize=["tokens", "chunks"])
def key_reader_kernel(
    q, k, do, beta, log_decay, docs, inverse, weights, partial, states, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M^T dO of one chunk into `partial` [B, T, M, V], and R = Q_s^T dO - (beta K_s)^T T^T M^T dO into `states`."""
    parts: tl.constexpr = V // BV
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    stride: tl.constexpr = state_heads * K
    k += (batch * tokens * state_heads + head) * K
    log_decay += (batch * tokens * state_heads + head) * K
    partial += (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, values = tl.arange(0, C), part * BV + tl.arange(0, BV)
    kind = k.dtype.element_ty
    turned = rows[None, :] * C + rows[:, None]
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    _, _, entering, _ = load_bounds(docs, batch, first, rows, tokens, C)
    at = row_head * chunks + chunk
    for_change = tl.zeros([C, BV], tl.float32)
    for member in range(group):
        reader = head * group + member
        seen = tl.load(weights + ((batch * heads + reader) * chunks + chunk) * C * C + turned)
        y = load_rows(do + (batch * tokens * heads + reader) * V, first, rows, heads * V, values, tokens)
        for_change = tl.dot(seen, y, for_change, input_precision=PRECISION)
    store_rows(partial, first, rows, state_heads * V, values, tokens, for_change)
    solve = tl.load(inverse + at * C * C + turned)
    wanted = tl.dot(solve, for_change.to(kind), input_precision=PRECISION)
    wanted = (wanted * -strength[:, None]).to(kind)
    for piece in range(K // BK):
        dims = piece * BK + tl.arange(0, BK)
        reach = start_columns(log_decay, first, rows, stride, dims, tokens) * entering[None, :]
        keys = load_columns(k, first, rows, stride, dims, tokens).to(tl.float32) * reach
        for_state = tl.dot(keys.to(kind), wanted, input_precision=PRECISION)
        for member in range(group):
            reader = head * group + member
            line = batch * tokens * heads + reader
            x = load_columns(q + line * K, first, rows, heads * K, dims, tokens).to(tl.float32) * reach
            y = load_rows(do + line * V, first, rows, heads * V, values, tokens)
            for_state = tl.dot(x.to(kind), y, for_state, input_precision=PRECISION)
        to = states + at * K * V + dims[:, None] * V + values[None, :]
        tl.store(to, for_state.to(states.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def key_change_kernel(
    k, v, beta, log_decay, docs, inverse, states, leaving, partial, change, missing, dv, direct, tokens, chunks,
    state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of one chunk: U into `change`, dr into `missing`, dv, and sums of dr V over the columns into `direct`.

    `partial` is M^T dO; `direct` is [parts, B, T, M].
    """
    parts: tl.constexpr = V // BV
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    count = tl.num_programs(0) // (parts * chunks)
    key_stride: tl.constexpr = state_heads * K
    stride: tl.constexpr = state_heads * V
    k += (batch * tokens * state_heads + head) * K
    log_decay += (batch * tokens * state_heads + head) * K
    values_of_head = (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, values = tl.arange(0, C), part * BV + tl.arange(0, BV)
    kind = k.dtype.element_ty
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    _, _, entering, open_end = load_bounds(docs, batch, first, rows, tokens, C)
    at = row_head * chunks + chunk
    held = tl.zeros([C, BV], tl.float32)
    wanted = load_rows(partial + values_of_head, first, rows, stride, values, tokens).to(tl.float32)
    for piece in range(K // BK):
        dims = piece * BK + tl.arange(0, BK)
        square = at * K * V + dims[:, None] * V + values[None, :]
        keys = load_rows(k, first, rows, key_stride, dims, tokens).to(tl.float32)
        reading = keys * start_rows(log_decay, first, rows, key_stride, dims, tokens) * entering[:, None]
        held = tl.dot(reading.to(kind), tl.load(states + square), held, input_precision=PRECISION)
        writing = keys * end_rows(log_decay, first, rows, key_stride, dims, tokens, C) * open_end[:, None]
        wanted = tl.dot(writing.to(kind), tl.load(leaving + square), wanted, input_precision=PRECISION)
    value = load_rows(v + values_of_head, first, rows, stride, values, tokens).to(tl.float32)
    solve = tl.load(inverse + at * C * C + rows[:, None] * C + rows[None, :])
    found = tl.dot(solve, (strength[:, None] * (value - held)).to(kind), input_precision=PRECISION)
    store_rows(change + values_of_head, first, rows, stride, values, tokens, found)
    turned = tl.load(inverse + at * C * C + rows[None, :] * C + rows[:, None])
    moved = tl.dot(turned, wanted.to(kind), input_precision=PRECISION)
    store_rows(missing + values_of_head, first, rows, stride, values, tokens, moved)
    store_rows(dv + values_of_head, first, rows, stride, values, tokens, moved * strength[:, None])
    direct += tl.cast(part, tl.int64) * count * tokens
    store_scalars(direct, batch, first, rows, tokens, state_heads, head, tl.sum(moved * value, 1))
