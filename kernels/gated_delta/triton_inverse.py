"""T = (I + A)^-1 of every chunk, A the strictly lower part of beta K K^T times decays: the change of each token.

A chunk is 4 x 4 tiles of 16 tokens. A tile on the diagonal is inverted by doubling: with X the inverse of its diagonal
blocks of s tokens and B what joins two neighbouring blocks, X - X B X is the inverse for blocks of 2 s. The tiles below
follow from those above, T_ij = -T_ii sum_k A_ik T_kj. Every intermediate is an inverse of a part of I + A, so keys of
length one bound it by 2 however alike the keys are, which the powers of A in a Neumann series are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import (
    LOG2E,
    load_columns,
    load_documents,
    load_ends,
    load_rows,
    load_scalars,
)


@triton.jit
def tile_of_a(
    pairs,
    strength,
    reader_total,
    writer_total,
    reader,
    writer,
    DIAGONAL: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):
    """Products of keys [16 readers, 16 writers] -> the tile of A."""
    seen = reader[:, None] == writer[None, :]
    if DIAGONAL:
        place = tl.arange(0, 16)
        seen = seen & (place[:, None] > place[None, :])
    found = tl.where(seen, pairs * strength[:, None], 0.0)
    if HAS_DECAY:
        # of tokens that are not seen the difference may be positive
        found *= tl.exp2(tl.where(seen, reader_total[:, None] - writer_total[None, :], 0.0))
    return found


@triton.jit
def unit_inverse(a, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower [16, 16]."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    found = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, a, 0.0)
    for doubling in tl.static_range(3):
        size = 2 << doubling
        joint = tl.where(
            (row // (2 * size) == column // (2 * size)) & (row // size != column // size), a, 0.0
        )
        half = tl.dot(found, joint, input_precision=PRECISION)
        found -= tl.dot(half, found, input_precision=PRECISION)
    return found


@triton.jit
def store_tile(to, row, column, tile):
    place = (row * 16 + tl.arange(0, 16))[:, None] * 64 + (column * 16 + tl.arange(0, 16))[None, :]
    tl.store(to + place, tile.to(to.dtype.element_ty))


@triton.jit
def store_inverse(to, g00, g10, g11, g20, g21, g22, g30, g31, g32, g33, PRECISION: tl.constexpr):
    """T [64, 64] of a chunk from the tiles of its A."""
    x0 = unit_inverse(g00, PRECISION)
    x1 = unit_inverse(g11, PRECISION)
    x2 = unit_inverse(g22, PRECISION)
    x3 = unit_inverse(g33, PRECISION)
    x10 = -tl.dot(x1, tl.dot(g10, x0, input_precision=PRECISION), input_precision=PRECISION)
    x21 = -tl.dot(x2, tl.dot(g21, x1, input_precision=PRECISION), input_precision=PRECISION)
    x32 = -tl.dot(x3, tl.dot(g32, x2, input_precision=PRECISION), input_precision=PRECISION)
    sum20 = tl.dot(g20, x0, input_precision=PRECISION) + tl.dot(g21, x10, input_precision=PRECISION)
    sum31 = tl.dot(g31, x1, input_precision=PRECISION) + tl.dot(g32, x21, input_precision=PRECISION)
    x20 = -tl.dot(x2, sum20, input_precision=PRECISION)
    x31 = -tl.dot(x3, sum31, input_precision=PRECISION)
    sum30 = tl.dot(g30, x0, input_precision=PRECISION) + tl.dot(g31, x10, input_precision=PRECISION)
    x30 = -tl.dot(x3, sum30 + tl.dot(g32, x20, input_precision=PRECISION), input_precision=PRECISION)
    nothing = tl.zeros([16, 16], tl.float32)
    store_tile(to, 0, 0, x0)
    store_tile(to, 0, 1, nothing)
    store_tile(to, 0, 2, nothing)
    store_tile(to, 0, 3, nothing)
    store_tile(to, 1, 0, x10)
    store_tile(to, 1, 1, x1)
    store_tile(to, 1, 2, nothing)
    store_tile(to, 1, 3, nothing)
    store_tile(to, 2, 0, x20)
    store_tile(to, 2, 1, x21)
    store_tile(to, 2, 2, x2)
    store_tile(to, 2, 3, nothing)
    store_tile(to, 3, 0, x30)
    store_tile(to, 3, 1, x31)
    store_tile(to, 3, 2, x32)
    store_tile(to, 3, 3, x3)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def inverse_kernel(
    k, beta, log_decay, docs, inverse, kept, tokens, chunks,
    state_heads: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk of one head: T [64, 64], and the decay `kept` over the chunk, zero across a document boundary."""
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    k += (batch * tokens * state_heads + head) * K
    first = chunk * 64
    rows = tl.arange(0, 16)
    stride = state_heads * K
    g00 = tl.zeros([16, 16], tl.float32)
    g10 = tl.zeros([16, 16], tl.float32)
    g11 = tl.zeros([16, 16], tl.float32)
    g20 = tl.zeros([16, 16], tl.float32)
    g21 = tl.zeros([16, 16], tl.float32)
    g22 = tl.zeros([16, 16], tl.float32)
    g30 = tl.zeros([16, 16], tl.float32)
    g31 = tl.zeros([16, 16], tl.float32)
    g32 = tl.zeros([16, 16], tl.float32)
    g33 = tl.zeros([16, 16], tl.float32)
    for block in tl.static_range(K // BK):
        dims = block * BK + tl.arange(0, BK)
        row = load_rows(k, first, rows, stride, dims, tokens)
        column0 = load_columns(k, first, rows, stride, dims, tokens)
        g00 = tl.dot(row, column0, g00, input_precision=PRECISION)
        row = load_rows(k, first + 16, rows, stride, dims, tokens)
        column1 = load_columns(k, first + 16, rows, stride, dims, tokens)
        g10 = tl.dot(row, column0, g10, input_precision=PRECISION)
        g11 = tl.dot(row, column1, g11, input_precision=PRECISION)
        row = load_rows(k, first + 32, rows, stride, dims, tokens)
        column2 = load_columns(k, first + 32, rows, stride, dims, tokens)
        g20 = tl.dot(row, column0, g20, input_precision=PRECISION)
        g21 = tl.dot(row, column1, g21, input_precision=PRECISION)
        g22 = tl.dot(row, column2, g22, input_precision=PRECISION)
        row = load_rows(k, first + 48, rows, stride, dims, tokens)
        column3 = load_columns(k, first + 48, rows, stride, dims, tokens)
        g30 = tl.dot(row, column0, g30, input_precision=PRECISION)
        g31 = tl.dot(row, column1, g31, input_precision=PRECISION)
        g32 = tl.dot(row, column2, g32, input_precision=PRECISION)
        g33 = tl.dot(row, column3, g33, input_precision=PRECISION)
    b0 = load_scalars(beta, batch, first, rows, tokens, state_heads, head)
    b1 = load_scalars(beta, batch, first + 16, rows, tokens, state_heads, head)
    b2 = load_scalars(beta, batch, first + 32, rows, tokens, state_heads, head)
    b3 = load_scalars(beta, batch, first + 48, rows, tokens, state_heads, head)
    d0 = load_documents(docs, batch, first, rows, tokens)
    d1 = load_documents(docs, batch, first + 16, rows, tokens)
    d2 = load_documents(docs, batch, first + 32, rows, tokens)
    d3 = load_documents(docs, batch, first + 48, rows, tokens)
    t0, t1, t2, t3, whole = b0, b1, b2, b3, 1.0
    if HAS_DECAY:
        s0 = load_scalars(log_decay, batch, first, rows, tokens, state_heads, head) * LOG2E
        s1 = load_scalars(log_decay, batch, first + 16, rows, tokens, state_heads, head) * LOG2E
        s2 = load_scalars(log_decay, batch, first + 32, rows, tokens, state_heads, head) * LOG2E
        s3 = load_scalars(log_decay, batch, first + 48, rows, tokens, state_heads, head) * LOG2E
        before1 = tl.sum(s0, 0)
        before2 = before1 + tl.sum(s1, 0)
        before3 = before2 + tl.sum(s2, 0)
        t0 = tl.cumsum(s0, 0)
        t1 = tl.cumsum(s1, 0) + before1
        t2 = tl.cumsum(s2, 0) + before2
        t3 = tl.cumsum(s3, 0) + before3
        whole = tl.exp2(before3 + tl.sum(s3, 0))
    g00 = tile_of_a(g00, b0, t0, t0, d0, d0, True, HAS_DECAY)
    g10 = tile_of_a(g10, b1, t1, t0, d1, d0, False, HAS_DECAY)
    g11 = tile_of_a(g11, b1, t1, t1, d1, d1, True, HAS_DECAY)
    g20 = tile_of_a(g20, b2, t2, t0, d2, d0, False, HAS_DECAY)
    g21 = tile_of_a(g21, b2, t2, t1, d2, d1, False, HAS_DECAY)
    g22 = tile_of_a(g22, b2, t2, t2, d2, d2, True, HAS_DECAY)
    g30 = tile_of_a(g30, b3, t3, t0, d3, d0, False, HAS_DECAY)
    g31 = tile_of_a(g31, b3, t3, t1, d3, d1, False, HAS_DECAY)
    g32 = tile_of_a(g32, b3, t3, t2, d3, d2, False, HAS_DECAY)
    g33 = tile_of_a(g33, b3, t3, t3, d3, d3, True, HAS_DECAY)
    to = inverse + (row_head * chunks + chunk) * 64 * 64
    store_inverse(to, g00, g10, g11, g20, g21, g22, g30, g31, g32, g33, PRECISION)
    before, after = load_ends(docs, batch, first, tokens, 64)
    tl.store(kept + row_head * chunks + chunk, tl.where(before == after, whole, 0.0))
