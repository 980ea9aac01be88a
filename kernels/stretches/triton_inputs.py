"""From gradients of what chunks do to those of queries, keys, strengths and decays; all chunks side by side."""

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
def query_gradient_kernel(
    q, k, beta, log_decay, docs, inverse, dweights, dreaders, dq, moved, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    DELTA: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one chunk of one query head; `dweights` gets what Y's gradient adds to W's, in its place.

    `moved` [B, T, H] gets what moves the sum of decays since the chunk's start at each token, of its queries and, as
    far as these read it within the chunk, of its key.
    """
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, reader = row_head // heads, row_head % heads
    head = reader // (heads // state_heads)
    k += (batch * tokens * state_heads + head) * K
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    kind = k.dtype.element_ty
    begin, _, total, from_start, _ = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    to = row_head * chunks + chunk
    corner = rows[:, None] * C + rows[None, :]
    pairs = tl.load(dweights + to * C * C + corner).to(tl.float32)
    reading = tl.load(dreaders + to * C * K + rows[:, None] * K + dims[None, :])
    if DELTA:
        held = load_columns(k, first, rows, state_heads * K, dims, tokens).to(tl.float32)
        held = (held * from_start[None, :]).to(kind)
        pairs -= tl.dot(reading, held, input_precision=PRECISION)
        tl.store(dweights + to * C * C + corner, pairs.to(kind))
        at = (batch * state_heads + head) * chunks + chunk
        strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
        turned = tl.load(inverse + at * C * C + rows[None, :] * C + rows[:, None]).to(tl.float32)
        turned = (turned * strength[:, None]).to(kind)
        pairs = tl.dot(pairs.to(kind), turned, input_precision=PRECISION)
    at = (batch * tokens * heads + reader) * K
    pairs *= decays_to_earlier(begin, total, rows, 0, HAS_DECAY)
    if HAS_DECAY:
        # pair by pair: a token with itself has no decay, and beside strong ones its product would drown all others
        x = load_rows(q + at, first, rows, heads * K, dims, tokens)
        columns = load_columns(k, first, rows, state_heads * K, dims, tokens)
        passed = tl.dot(x, columns, input_precision=PRECISION) * pairs
        passed = tl.where(rows[:, None] > rows[None, :], passed, 0.0)
        found = tl.sum(passed, 1) - tl.sum(passed, 0)
        found += tl.sum(x.to(tl.float32) * reading.to(tl.float32), 1) * from_start
        store_scalars(moved, batch, first, rows, tokens, heads, reader, found)
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
    direct = reading.to(tl.float32) * from_start[:, None]
    result = tl.dot(pairs.to(kind), keys, direct, input_precision=PRECISION)
    store_rows(dq + at, first, rows, heads * K, dims, tokens, result)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def solve_gradient_kernel(
    q, k, beta, log_decay, docs, inverse, dweights, dwriters, dremoval, apart, dbeta, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of B, which queries and states have, to that of A times its decays, into `apart`.

    `apart` is [B, M, chunks, C, C]; dbeta [B, T, M] gets what is not of A.
    """
    group: tl.constexpr = heads // state_heads
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    k += (batch * tokens * state_heads + head) * K
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    kind = k.dtype.element_ty
    begin, end, total, from_start, to_end = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    at = row_head * chunks + chunk
    corner, mirrored = rows[:, None] * C + rows[None, :], rows[None, :] * C + rows[:, None]
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
    later = decays_to_later(end, total, rows, 0, HAS_DECAY)
    for_solve = tl.zeros([C, C], tl.float32)
    for member in range(group):
        reader = head * group + member
        to = (batch * heads + reader) * chunks + chunk
        queries = q + (batch * tokens * heads + reader) * K
        x = load_columns(queries, first, rows, heads * K, dims, tokens)
        pairs = tl.dot(keys, x, input_precision=PRECISION) * later
        straight = tl.load(dweights + to * C * C + corner)
        for_solve = tl.dot(pairs.to(kind), straight, for_solve, input_precision=PRECISION)
    taken = tl.load(dremoval + at * K * K + dims[:, None] * K + dims[None, :])
    columns = load_columns(k, first, rows, state_heads * K, dims, tokens).to(tl.float32)
    columns = (columns * from_start[None, :]).to(kind)
    writes = tl.load(dwriters + at * K * C + dims[:, None] * C + rows[None, :]).to(tl.float32)
    writes -= tl.dot(taken, columns, input_precision=PRECISION)
    ends = (keys.to(tl.float32) * to_end[:, None]).to(kind)
    for_solve += tl.dot(ends, writes.to(kind), input_precision=PRECISION)
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    solve = tl.load(inverse + at * C * C + corner).to(tl.float32)
    store_scalars(dbeta, batch, first, rows, tokens, state_heads, head, tl.sum(for_solve * solve, 0))
    solved = tl.load(inverse + at * C * C + mirrored)
    left = tl.dot(solved, (for_solve * strength[None, :]).to(kind), input_precision=PRECISION)
    found = tl.dot(left.to(kind), solved, input_precision=PRECISION)
    found *= -decays_to_earlier(begin, total, rows, 1, HAS_DECAY)
    tl.store(apart + at * C * C + corner, found.to(kind))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def reader_gradient_kernel(
    q, k, beta, log_decay, docs, inverse, weights, dweights, dreaders, partial, along, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    DELTA: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What all queries of a chunk add to the gradient of its keys.

    `partial` [B, T, M, K] float32 gets that gradient, `along` [B, T, M] what reading the entering state under the keys
    takes from the decays since the chunk's start.
    """
    group: tl.constexpr = heads // state_heads
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    k += (batch * tokens * state_heads + head) * K
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    kind = k.dtype.element_ty
    _, end, total, from_start, _ = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    later = decays_to_later(end, total, rows, 0, HAS_DECAY)
    at = row_head * chunks + chunk
    corner, mirrored = rows[:, None] * C + rows[None, :], rows[None, :] * C + rows[:, None]
    keys = load_rows(k, first, rows, state_heads * K, dims, tokens)
    if DELTA:
        strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
        change = tl.load(inverse + at * C * C + corner).to(tl.float32)
        change = (change * strength[None, :]).to(kind)
    for_key = tl.zeros([C, K], tl.float32)
    for_held = tl.zeros([C, K], tl.float32)
    for member in range(group):
        reader = head * group + member
        to = (batch * heads + reader) * chunks + chunk
        turned = tl.load(dweights + to * C * C + mirrored)
        wanted = turned.to(tl.float32)
        if DELTA:
            reading = tl.load(dreaders + to * C * K + rows[:, None] * K + dims[None, :])
            weight = tl.load(weights + to * C * C + mirrored)
            for_held = tl.dot(weight, reading, for_held, input_precision=PRECISION)
            wanted = tl.dot(change, turned, input_precision=PRECISION)
        x = load_rows(q + (batch * tokens * heads + reader) * K, first, rows, heads * K, dims, tokens)
        for_key = tl.dot((wanted * later).to(kind), x, for_key, input_precision=PRECISION)
    wide = keys.to(tl.float32)
    reach = for_held * from_start[:, None]
    if DELTA:
        for_key -= reach
        if HAS_DECAY:
            found = -tl.sum(reach * wide, 1)
            store_scalars(along, batch, first, rows, tokens, state_heads, head, found)
    to = (batch * tokens * state_heads + head) * K
    store_rows(partial + to, first, rows, state_heads * K, dims, tokens, for_key)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def writer_gradient_kernel(
    k, beta, log_decay, docs, inverse, writers, dwriters, dremoval, dkept, moved, partial, along, dk, dlog_decay,
    tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    DELTA: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What states add to the gradients of a chunk's keys and decays.

    Of the additive rule that is the last: dk, `dlog_decay` [B, T, M]. Of the delta rule dk is added to `partial`.
    """
    group: tl.constexpr = heads // state_heads
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    keys_of_head = (batch * tokens * state_heads + head) * K
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    kind = k.dtype.element_ty
    _, _, _, from_start, to_end = load_decays(
        log_decay, docs, batch, head, first, rows, tokens, state_heads, C, HAS_DECAY
    )
    at = row_head * chunks + chunk
    stride: tl.constexpr = state_heads * K
    keys = load_rows(k + keys_of_head, first, rows, stride, dims, tokens)
    for_end = tl.load(dwriters + at * K * C + dims[None, :] * C + rows[:, None]).to(tl.float32)
    for_key = tl.zeros([C, K], tl.float32)
    if DELTA:
        held = (keys.to(tl.float32) * from_start[:, None]).to(kind)
        turned = tl.load(dremoval + at * K * K + dims[None, :] * K + dims[:, None])
        for_end -= tl.dot(held, turned, input_precision=PRECISION)
        strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
        change = tl.load(inverse + at * C * C + rows[:, None] * C + rows[None, :]).to(tl.float32)
        change = (change * strength[None, :]).to(kind)
        for_end = tl.dot(change, for_end.to(kind), input_precision=PRECISION)
        taken = tl.load(dremoval + at * K * K + dims[:, None] * K + dims[None, :])
        writing = tl.load(writers + at * K * C + dims[None, :] * C + rows[:, None])
        for_key = tl.dot(writing, taken, input_precision=PRECISION) * -from_start[:, None]
        by_held = tl.sum(for_key * keys.to(tl.float32), 1)
    for_end *= to_end[:, None]
    for_key += for_end + load_rows(partial + keys_of_head, first, rows, stride, dims, tokens)
    if DELTA:
        store_rows(partial + keys_of_head, first, rows, stride, dims, tokens, for_key)
    else:
        store_rows(dk + keys_of_head, first, rows, stride, dims, tokens, for_key)
    if HAS_DECAY:
        passed = tl.sum(for_end * keys.to(tl.float32), 1)
        for_total = -passed
        if DELTA:
            for_total += by_held
            for_total += load_scalars(along, batch, first, rows, tokens, state_heads, head)
        for member in range(group):
            for_total += load_scalars(moved, batch, first, rows, tokens, heads, head * group + member)
        whole = tl.sum(passed, 0) + tl.load(dkept + at)
        # a decay acts on every later token of its chunk
        summed = tl.cumsum(for_total, 0, reverse=True) + whole
        store_scalars(dlog_decay, batch, first, rows, tokens, state_heads, head, summed)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def pair_gradient_kernel(
    k, beta, apart, partial, dk, dbeta, dlog_decay, tokens, chunks,
    state_heads: tl.constexpr, K: tl.constexpr, C: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What A adds to the gradients of keys, strengths and decays: dk, and the other two in place."""
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    keys_of_head = (batch * tokens * state_heads + head) * K
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    kind = k.dtype.element_ty
    at = (row_head * chunks + chunk) * C * C
    keys = load_rows(k + keys_of_head, first, rows, state_heads * K, dims, tokens)
    strength = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    pairs = tl.load(apart + at + rows[:, None] * C + rows[None, :])
    reading = tl.dot(pairs, keys, input_precision=PRECISION)
    turned = tl.load(apart + at + rows[None, :] * C + rows[:, None]).to(tl.float32)
    read = tl.dot((turned * strength[None, :]).to(kind), keys, input_precision=PRECISION)
    wide = keys.to(tl.float32)
    by_reader = tl.sum(reading * wide, 1)
    direct = load_scalars(dbeta, batch, first, rows, tokens, state_heads, head)
    store_scalars(dbeta, batch, first, rows, tokens, state_heads, head, direct + by_reader)
    found = load_rows(partial + keys_of_head, first, rows, state_heads * K, dims, tokens)
    found += reading * strength[:, None] + read
    store_rows(dk + keys_of_head, first, rows, state_heads * K, dims, tokens, found)
    if HAS_DECAY:
        for_total = strength * by_reader - tl.sum(read * wide, 1)
        summed = load_scalars(dlog_decay, batch, first, rows, tokens, state_heads, head)
        summed += tl.cumsum(for_total, 0, reverse=True)
        store_scalars(dlog_decay, batch, first, rows, tokens, state_heads, head, summed)
