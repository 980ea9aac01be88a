"""What each chunk does, whatever is written: W, Y, what turns values into N, and P; for all chunks side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import (
    LOG2E,
    decays_to_earlier,
    load_columns,
    load_decays,
    load_ends,
    load_rows,
    load_scalars,
)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def matrices_kernel(
    q, k, beta, log_decay, docs, inverse, weights, readers, writers, removal, kept, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    DELTA: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W [B, H, chunks, C, C], Y [B, H, chunks, C, K], `writers` [B, M, chunks, K, C], -P [B, M, chunks, K, K].

    With B = T diag(beta) (`inverse` is T), or one where there is no delta rule, K_s the keys with the decay since the
    chunk's start and K_e with the decay to its end: W = (Q K^T decays) B, Y = Q_s - W K_s, writers = K_e^T B and
    P = K_e^T B K_s. `kept` [B, M, chunks] is written where DELTA is false; `gated_delta`'s inverse writes it elsewhere.
    """
    group: tl.constexpr = heads // state_heads
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    k += (batch * tokens * state_heads + head) * K
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    kind = k.dtype.element_ty
    begin, _, total, from_start, to_end = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    at = row_head * chunks + chunk
    corner = rows[:, None] * C + rows[None, :]
    columns = load_columns(k, first, rows, state_heads * K, dims, tokens)
    ends = columns.to(tl.float32) * to_end[None, :]
    if DELTA:
        held = load_rows(k, first, rows, state_heads * K, dims, tokens).to(tl.float32)
        held = (held * from_start[:, None]).to(kind)
        strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
        solve = tl.load(inverse + at * C * C + corner).to(tl.float32)
        change = (solve * strength[None, :]).to(kind)
        ends = tl.dot(ends.to(kind), change, input_precision=PRECISION)
        taken = tl.dot(ends.to(kind), held, input_precision=PRECISION)
        tl.store(removal + at * K * K + dims[:, None] * K + dims[None, :], (-taken).to(kind))
    else:
        whole = tl.cast(1.0, tl.float32)
        if HAS_DECAY:
            step = load_scalars(log_decay, batch, first, rows, tokens, state_heads, head) * LOG2E
            whole = tl.exp2(tl.sum(step, 0))
        before, after = load_ends(docs, batch, first, tokens, C)
        tl.store(kept + at, tl.where(before == after, whole, 0.0))
    tl.store(writers + at * K * C + dims[:, None] * C + rows[None, :], ends.to(kind))
    decays = decays_to_earlier(begin, total, rows, 0, HAS_DECAY)
    for member in range(group):
        reader = head * group + member
        x = load_rows(q + (batch * tokens * heads + reader) * K, first, rows, heads * K, dims, tokens)
        pairs = tl.dot(x, columns, input_precision=PRECISION) * decays
        reading = x.to(tl.float32) * from_start[:, None]
        if DELTA:
            pairs = tl.dot(pairs.to(kind), change, input_precision=PRECISION)
            reading -= tl.dot(pairs.to(kind), held, input_precision=PRECISION)
        to = (batch * heads + reader) * chunks + chunk
        tl.store(weights + to * C * C + corner, pairs.to(kind))
        tl.store(readers + to * C * K + rows[:, None] * K + dims[None, :], reading.to(kind))
