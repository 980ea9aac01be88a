"""What each chunk does to the state, and its output; both for all chunks side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import (
    decays_to_earlier,
    load_columns,
    load_decays,
    load_rows,
    load_scalars,
    store_rows,
)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def transition_kernel(
    k, v, beta, log_decay, docs, inverse, removal, states, tokens, chunks,
    state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-P = -K_e^T T (beta K_s) [K, K] and N = K_e^T T (beta V) [K, V] of one chunk of one head.

    K_s are the keys with the decay since the chunk's start, K_e with the decay to its end.
    """
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    k += (batch * tokens * state_heads + head) * K
    v += (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    kind = k.dtype.element_ty
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    _, _, _, from_start, to_end = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    at = row_head * chunks + chunk
    solve = tl.load(inverse + at * C * C + rows[:, None] * C + rows[None, :]).to(tl.float32)
    writers = load_columns(k, first, rows, state_heads * K, dims, tokens)
    weighted = (solve * (strength * from_start)[None, :]).to(kind)
    for block in tl.static_range(K // BK):
        columns = block * BK + tl.arange(0, BK)
        right = load_rows(k, first, rows, state_heads * K, columns, tokens)
        held = tl.dot(weighted, right, input_precision=PRECISION) * -to_end[:, None]
        found = tl.dot(writers, held.to(kind), input_precision=PRECISION)
        tl.store(removal + at * K * K + dims[:, None] * K + columns[None, :], found.to(kind))
    weighted = (solve * strength[None, :]).to(kind)
    for block in tl.static_range(V // BV):
        columns = block * BV + tl.arange(0, BV)
        right = load_rows(v, first, rows, state_heads * V, columns, tokens)
        fresh = tl.dot(weighted, right, input_precision=PRECISION) * to_end[:, None]
        found = tl.dot(writers, fresh.to(kind), input_precision=PRECISION)
        tl.store(states + at * K * V + dims[:, None] * V + columns[None, :], found.to(kind))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def output_kernel(
    q, k, v, beta, log_decay, docs, inverse, states, out, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of the output of one chunk, of every query head that reads one head of the state."""
    parts: tl.constexpr = V // BV
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    k += (batch * tokens * state_heads + head) * K
    v += (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, dims, values = tl.arange(0, C), tl.arange(0, K), part * BV + tl.arange(0, BV)
    kind = k.dtype.element_ty
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    begin, _, total, from_start, _ = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    at = row_head * chunks + chunk
    state = tl.load(states + at * K * V + dims[:, None] * V + values[None, :])
    held = tl.dot(load_rows(k, first, rows, state_heads * K, dims, tokens), state, input_precision=PRECISION)
    value = load_rows(v, first, rows, state_heads * V, values, tokens).to(tl.float32)
    missing = strength[:, None] * (value - from_start[:, None] * held)
    solve = tl.load(inverse + at * C * C + rows[:, None] * C + rows[None, :])
    change = tl.dot(solve, missing.to(kind), input_precision=PRECISION).to(kind)
    keys = load_columns(k, first, rows, state_heads * K, dims, tokens)
    decays = decays_to_earlier(begin, total, rows, 0, HAS_DECAY)
    for member in range(group):
        reader = head * group + member
        x = load_rows(q + (batch * tokens * heads + reader) * K, first, rows, heads * K, dims, tokens)
        pairs = tl.dot(x, keys, input_precision=PRECISION) * decays
        result = tl.dot(x, state, input_precision=PRECISION) * from_start[:, None]
        result = tl.dot(pairs.to(kind), change, result, input_precision=PRECISION)
        store_rows(
            out + (batch * tokens * heads + reader) * V, first, rows, heads * V, values, tokens, result
        )
