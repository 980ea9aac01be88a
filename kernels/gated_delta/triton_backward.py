"""Gradients of gated_delta, chunk by chunk, in three kernels around the mirrored state pass.

With r = beta (V - K_s S), the changes are U = T r, the output Q_s S + M U (M the lower part of Q K^T times decays) and
the leaving state kept S + K_e^T U. For dO and the gradient E of the leaving state:

    dU = M^T dO + K_e E,   dr = T^T dU,   dS = kept E + Q_s^T dO - (beta K_s)^T dr.

Put together, dS = kept E - P^T E + R with R = Q_s^T dO - (beta K_s)^T T^T M^T dO and the P of the forward pass. Since
(I + A) U = r, the gradient of A is -dr U^T: that of T itself is never needed. Decays are gated through the sums of
q dq over readers less those of k dk over writers.

U and dr are written between two kernels: the second needs both as they stand and transposed, and a product that is
transposed in registers gives wrong gradients on Hopper under Triton 3.4 to 3.7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import (
    decays_to_earlier,
    decays_to_later,
    load_columns,
    load_decays,
    load_rows,
    load_scalars,
    store_rows,
    store_scalars,
)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def reader_kernel(
    q, k, do, beta, log_decay, docs, inverse, partial, states, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk's queries want: M^T dO into `partial` [B, T, M, V] and R into `states` [B, M, chunks, K, V]."""
    parts: tl.constexpr = V // BV
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    k += (batch * tokens * state_heads + head) * K
    first = chunk * C
    rows, dims, values = tl.arange(0, C), tl.arange(0, K), part * BV + tl.arange(0, BV)
    kind = k.dtype.element_ty
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    _, end, total, from_start, _ = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    at = row_head * chunks + chunk
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
    decays = decays_to_later(end, total, rows, 0, HAS_DECAY)
    for_change = tl.zeros([C, BV], tl.float32)
    for_state = tl.zeros([K, BV], tl.float32)
    for member in range(group):
        reader = head * group + member
        x = load_columns(q + (batch * tokens * heads + reader) * K, first, rows, heads * K, dims, tokens)
        y = load_rows(do + (batch * tokens * heads + reader) * V, first, rows, heads * V, values, tokens)
        pairs = tl.dot(keys, x, input_precision=PRECISION) * decays
        for_change = tl.dot(pairs.to(kind), y, for_change, input_precision=PRECISION)
        y = (y.to(tl.float32) * from_start[:, None]).to(kind)
        for_state = tl.dot(x, y, for_state, input_precision=PRECISION)
    store_rows(
        partial + (batch * tokens * state_heads + head) * V,
        first,
        rows,
        state_heads * V,
        values,
        tokens,
        for_change,
    )
    turned = tl.load(inverse + at * C * C + rows[None, :] * C + rows[:, None])
    wanted = tl.dot(turned, for_change.to(kind), input_precision=PRECISION)
    wanted = (wanted * -(strength * from_start)[:, None]).to(kind)
    keys = load_columns(k, first, rows, state_heads * K, dims, tokens)
    for_state = tl.dot(keys, wanted, for_state, input_precision=PRECISION)
    to = states + at * K * V + dims[:, None] * V + values[None, :]
    tl.store(to, for_state.to(states.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def change_kernel(
    k, v, beta, log_decay, docs, inverse, states, leaving, kept, partial, change, missing, dv, direct, read, overlap,
    tokens, chunks,
    state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of one chunk: U into `change`, dr into `missing`, dv, and sums over the columns for beta and the decay.

    `partial` is M^T dO. `direct` and `read` [parts, B, T, M] get the sums of dr (V - K_s S) and of dr K_s S, `overlap`
    [parts, B, M, chunks] the gradient of the decay over the whole chunk.
    """
    parts: tl.constexpr = V // BV
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    pair = tl.program_id(0) // parts
    row_head = (pair // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    count = tl.num_programs(0) // parts
    k += (batch * tokens * state_heads + head) * K
    values_of_head = (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, dims, values = tl.arange(0, C), tl.arange(0, K), part * BV + tl.arange(0, BV)
    kind = k.dtype.element_ty
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    _, _, _, from_start, to_end = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    at = row_head * chunks + chunk
    square = dims[:, None] * V + values[None, :]
    state = tl.load(states + at * K * V + square)
    ahead = tl.load(leaving + at * K * V + square)
    if HAS_DECAY:
        shared = tl.sum(tl.sum(state.to(tl.float32) * ahead.to(tl.float32), 1), 0)
        tl.store(overlap + tl.cast(part, tl.int64) * count + pair, shared * tl.load(kept + at))
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
    stride: tl.constexpr = state_heads * V
    value = load_rows(v + values_of_head, first, rows, stride, values, tokens).to(tl.float32)
    held = tl.dot(keys, state, input_precision=PRECISION) * from_start[:, None]
    solve = tl.load(inverse + at * C * C + rows[:, None] * C + rows[None, :])
    found = tl.dot(solve, (strength[:, None] * (value - held)).to(kind), input_precision=PRECISION)
    store_rows(change + values_of_head, first, rows, stride, values, tokens, found)
    wanted = load_rows(partial + values_of_head, first, rows, stride, values, tokens).to(tl.float32)
    wanted += tl.dot(keys, ahead, input_precision=PRECISION) * to_end[:, None]
    turned = tl.load(inverse + at * C * C + rows[None, :] * C + rows[:, None])
    wanted = tl.dot(turned, wanted.to(kind), input_precision=PRECISION)
    store_rows(missing + values_of_head, first, rows, stride, values, tokens, wanted)
    store_rows(dv + values_of_head, first, rows, stride, values, tokens, wanted * strength[:, None])
    apart = tl.cast(part, tl.int64) * (count // chunks) * tokens
    store_scalars(
        direct + apart, batch, first, rows, tokens, state_heads, head, tl.sum(wanted * (value - held), 1)
    )
    if HAS_DECAY:
        store_scalars(read + apart, batch, first, rows, tokens, state_heads, head, tl.sum(wanted * held, 1))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def query_gradient_kernel(
    k, q, do, log_decay, docs, states, change, dq, moved, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one chunk of one query head, columns in tiles.

    `moved` [tiles, B, T, H] gets the sums of q dq, which move the decays.
    """
    parts: tl.constexpr = K // BK
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, reader = row_head // heads, row_head % heads
    head = reader // (heads // state_heads)
    count = tl.num_programs(0) // (parts * chunks)
    first = chunk * C
    rows, dims = tl.arange(0, C), part * BK + tl.arange(0, BK)
    kind = k.dtype.element_ty
    begin, _, total, from_start, _ = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    change += (batch * tokens * state_heads + head) * V
    do += (batch * tokens * heads + reader) * V
    states += ((batch * state_heads + head) * chunks + chunk) * K * V
    for_query = tl.zeros([C, BK], tl.float32)
    pairs = tl.zeros([C, C], tl.float32)
    for piece in tl.static_range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        y = load_rows(do, first, rows, heads * V, values, tokens)
        turned = load_columns(change, first, rows, state_heads * V, values, tokens)
        pairs = tl.dot(y, turned, pairs, input_precision=PRECISION)
        state = tl.load(states + dims[None, :] * V + values[:, None])
        for_query = tl.dot(y, state, for_query, input_precision=PRECISION)
    weights = (pairs * decays_to_earlier(begin, total, rows, 0, HAS_DECAY)).to(kind)
    keys = load_rows(
        k + (batch * tokens * state_heads + head) * K, first, rows, state_heads * K, dims, tokens
    )
    for_query = tl.dot(weights, keys, for_query * from_start[:, None], input_precision=PRECISION)
    at = (batch * tokens * heads + reader) * K
    store_rows(dq + at, first, rows, heads * K, dims, tokens, for_query)
    if HAS_DECAY:
        x = load_rows(q + at, first, rows, heads * K, dims, tokens).to(tl.float32)
        moved += tl.cast(part, tl.int64) * count * tokens
        store_scalars(moved, batch, first, rows, tokens, heads, reader, tl.sum(for_query * x, 1))


@triton.jit(do_not_specialize=["tokens", "chunks", "batches"])
def key_gradient_kernel(
    q, k, do, beta, log_decay, docs, states, leaving, change, missing, dv, direct, read, overlap, moved,
    dk, dbeta, dlog_decay, tokens, chunks, batches,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, QUERY_PARTS: tl.constexpr,
    C: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one chunk of one head of the state, columns in tiles, and the tile's part of the gates' gradients.

    Both gradients are sums over tiles [tiles, B, T, M]; the first tile adds what other kernels have summed.
    """
    parts: tl.constexpr = K // BK
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    keys_of_head = (batch * tokens * state_heads + head) * K
    values_of_head = (batch * tokens * state_heads + head) * V
    first = chunk * C
    rows, dims = tl.arange(0, C), part * BK + tl.arange(0, BK)
    kind = k.dtype.element_ty
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    begin, end, total, from_start, to_end = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    at = row_head * chunks + chunk
    stride: tl.constexpr = state_heads * V
    # one accumulator for a key as queries read it, as it is written, as later keys read it, and as it reads
    for_key = tl.zeros([C, BK], tl.float32)
    for member in range(group):
        reader = head * group + member
        incoming = do + (batch * tokens * heads + reader) * V
        pairs = tl.zeros([C, C], tl.float32)
        for piece in range(V // BV):
            values = piece * BV + tl.arange(0, BV)
            y = load_rows(change + values_of_head, first, rows, stride, values, tokens)
            turned = load_columns(incoming, first, rows, heads * V, values, tokens)
            pairs = tl.dot(y, turned, pairs, input_precision=PRECISION)
        weights = (pairs * decays_to_later(end, total, rows, 0, HAS_DECAY)).to(kind)
        x = load_rows(q + (batch * tokens * heads + reader) * K, first, rows, heads * K, dims, tokens)
        for_key = tl.dot(weights, x, for_key, input_precision=PRECISION)
    keys = load_rows(k + keys_of_head, first, rows, state_heads * K, dims, tokens)
    for_total = tl.zeros([C], tl.float32)
    for_end = 0.0
    # an accumulator of its own: one that is read between two products came out wrong on Hopper (Triton 3.6)
    as_written = tl.zeros([C, BK], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        written = load_rows(change + values_of_head, first, rows, stride, values, tokens).to(tl.float32)
        written = (written * to_end[:, None]).to(kind)
        ahead = tl.load(leaving + at * K * V + dims[None, :] * V + values[:, None])
        as_written = tl.dot(written, ahead, as_written, input_precision=PRECISION)
    if HAS_DECAY:
        wide_keys = keys.to(tl.float32)
        moved_by_end = tl.sum(as_written * wide_keys, 1)
        for_total = -tl.sum(for_key * wide_keys, 1) - moved_by_end
        for_end = tl.sum(moved_by_end, 0)
    for_key += as_written
    pairs = tl.zeros([C, C], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        y = load_rows(missing + values_of_head, first, rows, stride, values, tokens)
        turned = load_columns(change + values_of_head, first, rows, stride, values, tokens)
        pairs = tl.dot(y, turned, pairs, input_precision=PRECISION)
    pairs *= -decays_to_earlier(begin, total, rows, 1, HAS_DECAY)
    key_columns = load_columns(k + keys_of_head, first, rows, state_heads * K, dims, tokens)
    shared = pairs * tl.dot(keys, key_columns, input_precision=PRECISION)
    for_strength = tl.sum(shared, 1)
    if HAS_DECAY:
        for_total += strength * for_strength - tl.sum(shared * strength[:, None], 0)
    for_key = tl.dot((pairs * strength[:, None]).to(kind), keys, for_key, input_precision=PRECISION)
    pairs = tl.zeros([C, C], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        y = load_rows(change + values_of_head, first, rows, stride, values, tokens)
        turned = load_columns(dv + values_of_head, first, rows, stride, values, tokens)
        pairs = tl.dot(y, turned, pairs, input_precision=PRECISION)
        reading = load_rows(dv + values_of_head, first, rows, stride, values, tokens).to(tl.float32)
        reading = (reading * -from_start[:, None]).to(kind)
        state = tl.load(states + at * K * V + dims[None, :] * V + values[:, None])
        for_key = tl.dot(reading, state, for_key, input_precision=PRECISION)
    weights = (pairs * -decays_to_later(end, total, rows, 1, HAS_DECAY)).to(kind)
    for_key = tl.dot(weights, keys, for_key, input_precision=PRECISION)
    store_rows(dk + keys_of_head, first, rows, state_heads * K, dims, tokens, for_key)
    if part == 0:
        for source in tl.static_range(PARTS):
            apart = batches * tl.cast(source, tl.int64) * state_heads
            for_strength += load_scalars(
                direct + apart * tokens, batch, first, rows, tokens, state_heads, head
            )
            if HAS_DECAY:
                held = load_scalars(read + apart * tokens, batch, first, rows, tokens, state_heads, head)
                for_total -= strength * held
                for_end += tl.load(overlap + apart * chunks + at)
        if HAS_DECAY:
            for source in tl.static_range(QUERY_PARTS):
                apart = batches * tl.cast(source, tl.int64) * heads
                for member in range(group):
                    reader = head * group + member
                    for_total += load_scalars(
                        moved + apart * tokens, batch, first, rows, tokens, heads, reader
                    )
    apart = batches * tl.cast(part, tl.int64) * state_heads * tokens
    store_scalars(dbeta + apart, batch, first, rows, tokens, state_heads, head, for_strength)
    if HAS_DECAY:
        # a decay acts on every later token of its chunk
        found = tl.cumsum(for_total, 0, reverse=True) + for_end
        store_scalars(dlog_decay + apart, batch, first, rows, tokens, state_heads, head, found)
