"""Outputs of all stretches together, and what their queries want of states; all chunks side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_rows, store_rows
from linearize.kernels.stretches.triton_common import (
    is_live,
    load_blocks,
    load_bound,
    pair_levels,
    stretch_levels,
    stretch_shares,
)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def output_kernel(
    v, shares, place, bounds, weights, readers, states, out, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, OLDER: tl.constexpr, MOST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of the output of one chunk of one query head: W by the shares of its pairs, and Y over live states."""
    parts: tl.constexpr = V // BV
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, reader = row_head // heads, row_head % heads
    head = reader // (heads // state_heads)
    first = chunk * C
    rows, dims, values = tl.arange(0, C), tl.arange(0, K), part * BV + tl.arange(0, BV)
    inside = first + rows < tokens
    kind = v.dtype.element_ty
    stride: tl.constexpr = heads * (MOST + 1)
    shares += (batch * tokens + first) * stride + reader * (MOST + 1)
    blocks = load_blocks(place, batch, first, rows, tokens, BITS)
    bound = load_bound(bounds, batch, chunk, chunks)
    at = row_head * chunks + chunk
    pairs = tl.load(weights + at * C * C + rows[:, None] * C + rows[None, :]).to(tl.float32)
    pair = rows[:, None] * stride + pair_levels(blocks, blocks, MOST)
    pairs *= tl.load(shares + pair, mask=inside[:, None], other=0.0)
    value = load_rows(
        v + (batch * tokens * state_heads + head) * V, first, rows, state_heads * V, values, tokens
    )
    result = tl.dot(pairs.to(kind), value, input_precision=PRECISION)
    reading = tl.load(readers + at * C * K + rows[:, None] * K + dims[None, :]).to(tl.float32)
    line = (batch * state_heads + head) * (LEVELS + OLDER)
    for level in range(LEVELS + OLDER):
        if is_live(bound, level, C, BITS, LEVELS):
            there = stretch_levels(blocks, bound, level, BITS, LEVELS, MOST)
            share = stretch_shares(shares, blocks, there, rows, inside, level, stride, LEVELS, MOST, OLDER)
            state = tl.load(
                states + ((line + level) * chunks + chunk) * K * V + dims[:, None] * V + values[None, :]
            )
            result = tl.dot((reading * share[:, None]).to(kind), state, result, input_precision=PRECISION)
    store_rows(out + (batch * tokens * heads + reader) * V, first, rows, heads * V, values, tokens, result)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def reader_kernel(
    do, shares, place, bounds, readers, leaving, tokens, chunks,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, OLDER: tl.constexpr, MOST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of one chunk want of each live state, into `leaving` [B, M, S, chunks, K, V]."""
    parts: tl.constexpr = V // BV
    group: tl.constexpr = heads // state_heads
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    first = chunk * C
    rows, dims, values = tl.arange(0, C), tl.arange(0, K), part * BV + tl.arange(0, BV)
    inside = first + rows < tokens
    kind = do.dtype.element_ty
    stride: tl.constexpr = heads * (MOST + 1)
    shares += (batch * tokens + first) * stride
    blocks = load_blocks(place, batch, first, rows, tokens, BITS)
    bound = load_bound(bounds, batch, chunk, chunks)
    for level in range(LEVELS + OLDER):
        if is_live(bound, level, C, BITS, LEVELS):
            there = stretch_levels(blocks, bound, level, BITS, LEVELS, MOST)
            found = tl.zeros([K, BV], tl.float32)
            for member in range(group):
                reader = head * group + member
                share = stretch_shares(
                    shares + reader * (MOST + 1),
                    blocks,
                    there,
                    rows,
                    inside,
                    level,
                    stride,
                    LEVELS,
                    MOST,
                    OLDER,
                )
                y = load_rows(
                    do + (batch * tokens * heads + reader) * V, first, rows, heads * V, values, tokens
                )
                at = (batch * heads + reader) * chunks + chunk
                turned = tl.load(readers + at * C * K + rows[None, :] * K + dims[:, None]).to(tl.float32)
                found = tl.dot((turned * share[None, :]).to(kind), y, found, input_precision=PRECISION)
            at = (row_head * (LEVELS + OLDER) + level) * chunks + chunk
            tl.store(leaving + at * K * V + dims[:, None] * V + values[None, :], found.to(kind))
