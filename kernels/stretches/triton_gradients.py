"""Gradients of values, of shares, and of what a chunk does: W, Y, `writers`, P; all chunks side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import (
    load_columns,
    load_documents,
    load_rows,
    store_rows,
)
from linearize.kernels.stretches.triton_common import (
    CARRIED,
    WRITTEN,
    is_live,
    load_blocks,
    load_bound,
    pair_levels,
    stretch_levels,
    stretch_shares,
    written,
)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def value_gradient_kernel(
    v, do, shares, place, bounds, docs, weights, writers, kept, marks, states, leaving,
    dv, dwriters, dremoval, dkept, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, OLDER: tl.constexpr, MOST: tl.constexpr,
    DELTA: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk of one head of the state: dv, and gradients of `writers`, of -P, and of the decay over the chunk.

    The latter is the gradient of `kept` times `kept`, [B, M, chunks].
    """
    group: tl.constexpr = heads // state_heads
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    first = chunk * C
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    document = load_documents(docs, batch, first, rows, tokens)
    owned = (document == tl.load(docs + batch * tokens + tl.minimum(first + C, tokens) - 1)) & (
        first + rows < tokens
    )
    kind = v.dtype.element_ty
    stride: tl.constexpr = heads * (MOST + 1)
    shares += (batch * tokens + first) * stride
    blocks = load_blocks(place, batch, first, rows, tokens, BITS)
    following = load_bound(bounds, batch, chunk + 1, chunks)
    there = rows[None, :] * stride + pair_levels(blocks, blocks, MOST)
    corner = rows[None, :] * C + rows[:, None]
    at = row_head * chunks + chunk
    turned = tl.load(writers + at * K * C + dims[None, :] * C + rows[:, None])
    for_writers = tl.zeros([K, C], tl.float32)
    for_removal = tl.zeros([K, K], tl.float32)
    for_kept = tl.cast(0.0, tl.float32)
    values_of_head = (batch * tokens * state_heads + head) * V
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        for_value = tl.zeros([C, BV], tl.float32)
        for member in range(group):
            reader = head * group + member
            to = (batch * heads + reader) * chunks + chunk
            pairs = tl.load(weights + to * C * C + corner).to(tl.float32)
            pairs *= tl.load(
                shares + reader * (MOST + 1) + there, mask=(first + rows < tokens)[None, :], other=0.0
            )
            y = load_rows(do + (batch * tokens * heads + reader) * V, first, rows, heads * V, values, tokens)
            for_value = tl.dot(pairs.to(kind), y, for_value, input_precision=PRECISION)
        value = load_columns(v + values_of_head, first, rows, state_heads * V, values, tokens)
        for level in range(LEVELS + OLDER):
            here = (row_head * (LEVELS + OLDER) + level) * chunks + chunk
            mark = tl.load(marks + here)
            if mark & (WRITTEN | CARRIED) != 0:
                square = here * K * V + dims[:, None] * V + values[None, :]
                ahead = tl.load(leaving + square)
                if mark & WRITTEN != 0:
                    writes = written(blocks, owned, following, level, BITS, LEVELS)
                    own = tl.where(writes[:, None], turned.to(tl.float32), 0.0).to(kind)
                    for_value = tl.dot(own, ahead, for_value, input_precision=PRECISION)
                    own = tl.where(writes[None, :], value.to(tl.float32), 0.0).to(kind)
                    for_writers = tl.dot(ahead, own, for_writers, input_precision=PRECISION)
                if mark & CARRIED != 0:
                    if DELTA:
                        state = tl.load(states + here * K * V + dims[None, :] * V + values[:, None])
                        for_removal = tl.dot(ahead, state, for_removal, input_precision=PRECISION)
                    elif HAS_DECAY:
                        state = tl.load(states + square).to(tl.float32)
                        for_kept += tl.sum(tl.sum(state * ahead.to(tl.float32), 1), 0)
        store_rows(dv + values_of_head, first, rows, state_heads * V, values, tokens, for_value)
    tl.store(dwriters + at * K * C + dims[:, None] * C + rows[None, :], for_writers.to(kind))
    if DELTA:
        tl.store(dremoval + at * K * K + dims[:, None] * K + dims[None, :], for_removal.to(kind))
        diagonal = tl.where(dims[:, None] == dims[None, :], for_removal, 0.0)
        for_kept = tl.sum(tl.sum(diagonal, 1), 0)
    if HAS_DECAY:
        tl.store(dkept + at, for_kept * tl.load(kept + at))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def weight_gradient_kernel(
    v, do, shares, place, bounds, weights, readers, states, dweights, dreaders, dshares, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, OLDER: tl.constexpr, MOST: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk of one query head: gradients of W, of Y and of shares; WIDTH >= MOST + 1 is a power of two."""
    chunk = tl.program_id(0) % chunks
    row_head = (tl.program_id(0) // chunks).to(tl.int64)
    batch, reader = row_head // heads, row_head % heads
    head = reader // (heads // state_heads)
    first = chunk * C
    rows, dims, columns = tl.arange(0, C), tl.arange(0, K), tl.arange(0, WIDTH)
    inside = first + rows < tokens
    kind = v.dtype.element_ty
    stride: tl.constexpr = heads * (MOST + 1)
    lines = (batch * tokens + first) * stride + reader * (MOST + 1)
    shares += lines
    do += (batch * tokens * heads + reader) * V
    blocks = load_blocks(place, batch, first, rows, tokens, BITS)
    at = row_head * chunks + chunk
    corner = rows[:, None] * C + rows[None, :]
    pairs = tl.zeros([C, C], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        y = load_rows(do, first, rows, heads * V, values, tokens)
        value = load_columns(
            v + (batch * tokens * state_heads + head) * V, first, rows, state_heads * V, values, tokens
        )
        pairs = tl.dot(y, value, pairs, input_precision=PRECISION)
    levels = pair_levels(blocks, blocks, MOST)
    share = tl.load(shares + rows[:, None] * stride + levels, mask=inside[:, None], other=0.0)
    tl.store(dweights + at * C * C + corner, (pairs * share).to(kind))
    pairs *= tl.load(weights + at * C * C + corner).to(tl.float32)
    levels = tl.where(rows[:, None] >= rows[None, :], levels, 0)
    for_share = tl.zeros([C, WIDTH], tl.float32)
    for level in range(0, tl.max(tl.max(levels, 1), 0) + 1):
        # what is not causal is on level 0, with a weight of zero
        read = tl.sum(tl.where(levels == level, pairs, 0.0), 1)
        for_share += tl.where(columns[None, :] == level, read[:, None], 0.0)
    bound = load_bound(bounds, batch, chunk, chunks)
    reading = tl.load(readers + at * C * K + rows[:, None] * K + dims[None, :])
    states += ((batch * state_heads + head) * (LEVELS + OLDER) * chunks + chunk) * K * V
    for_reader = tl.zeros([C, K], tl.float32)
    for piece in range(V // BV):
        values = piece * BV + tl.arange(0, BV)
        y = load_rows(do, first, rows, heads * V, values, tokens)
        for level in range(LEVELS + OLDER):
            if is_live(bound, level, C, BITS, LEVELS):
                there = stretch_levels(blocks, bound, level, BITS, LEVELS, MOST)
                weight = stretch_shares(
                    shares, blocks, there, rows, inside, level, stride, LEVELS, MOST, OLDER
                )
                to = tl.cast(level, tl.int64) * chunks * K * V
                state = tl.load(states + to + dims[None, :] * V + values[:, None])
                found = tl.dot(y, state, input_precision=PRECISION)
                for_reader += found * weight[:, None]
                passed = tl.sum(found * reading.to(tl.float32), 1)
                if OLDER:
                    far = blocks >> (MOST - 1) != 0
                    less = tl.where(far & (level != LEVELS), passed, 0.0)
                    for_share -= tl.where(columns[None, :] == MOST, less[:, None], 0.0)
                    passed = tl.where(far | (level != LEVELS), passed, 0.0)
                for_share += tl.where(columns[None, :] == there[:, None], passed[:, None], 0.0)
    tl.store(dreaders + at * C * K + rows[:, None] * K + dims[None, :], for_reader.to(kind))
    tl.store(
        dshares + lines + rows[:, None] * stride + columns[None, :],
        for_share,
        mask=inside[:, None] & (columns <= MOST)[None, :],
    )
