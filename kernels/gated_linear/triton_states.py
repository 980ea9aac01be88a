"""States between periods of tokens: decayed sums of k v^T over the keys behind, or of q do^T over the queries ahead.

One kernel scans both ways. A sequence is cut into segments that are scanned side by side, each from nothing; a second
kernel sums the segments' totals, and whoever reads a state adds its segment's carry, decayed by the state's `span`: the
log decay since the segment began (minus infinity once its document has ended).
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_linear.triton_common import (
    FLOOR,
    LOG2E,
    in_halves,
    load_columns,
    load_decay,
    load_document,
    load_rows,
)


@triton.jit
def scan_kernel(
    x, y, weight, g, docs, start, start_norm, states, norms, spans, totals, total_norms, total_spans,
    tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, READ_BEFORE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_START: tl.constexpr, HAS_TOTALS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States [B, M, periods, K, V] that enter each period of TILES tiles, in the order of the scan.

    Forward x, y are k, v. REVERSE they are q, do of a state's `heads // state_heads` queries, and `weight` [B, T, H]
    the gradient of the denominators. DECAY: 0 none, 1 of a head, 2 of a key dimension.
    """
    tile_of_values = tl.program_id(0)
    segment = tl.program_id(1) % segments
    line = (tl.program_id(1) // segments).to(tl.int64)
    batch, head = line // state_heads, line % state_heads
    group: tl.constexpr = heads // state_heads
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    values = tile_of_values * BV + tl.arange(0, BV)
    square = dims[:, None] * V + values[None, :]
    x += (batch * tokens * heads + head * group) * K
    y += (batch * tokens * heads + head * group) * V
    total = tl.zeros([K, BV], tl.float32)
    norm = tl.zeros([K], tl.float32)
    span = tl.zeros([K], tl.float32) if DECAY == 2 else tl.cast(0.0, tl.float32)
    if HAS_START:  # noqa: SIM102
        if segment == (segments - 1 if REVERSE else 0):
            total = tl.load(start + line * K * V + square)
            if NORMALIZE:
                norm = tl.load(start_norm + line * K + dims)
    first = segment * per_segment * TILES
    count = tl.minimum(first + per_segment * TILES, tiles) - first
    for step in range(0, count):
        tile = first + count - 1 - step if REVERSE else first + step
        here = tile * C
        edge = (tile % TILES == TILES - 1) | (tile == tiles - 1) if REVERSE else tile % TILES == 0
        if edge:
            at = line * periods + tile // TILES
            tl.store(states + at * K * V + square, total.to(states.dtype.element_ty))
            if tile_of_values == 0:
                if NORMALIZE:
                    tl.store(norms + at * K + dims, norm)
                if DECAY == 2:
                    tl.store(spans + at * K + dims, span)
                else:
                    tl.store(spans + at, span)
        place = here + rows
        seen = place < tokens
        kept = 1.0
        if HAS_DOCS:
            before = load_document(docs, batch, here - 1, tokens)
            after = load_document(docs, batch, here + C - 1, tokens)
            owner = load_document(docs, batch, place, tokens)
            seen = seen & (owner == before if REVERSE else owner == after)
            kept = tl.where(before == after, 1.0, 0.0)
        # how much of each row reaches the far end of the tile, as a sum of its own terms
        if DECAY == 1:
            decays = g + batch * tokens * state_heads + head
            if REVERSE:
                shift: tl.constexpr = 1 if READ_BEFORE else 0
                moved = load_decay(
                    decays, place - shift, (rows >= shift) & (place - shift < tokens), state_heads
                )
                reach = tl.exp2(tl.cumsum(moved, 0))
            else:
                moved = load_decay(decays, place + 1, (rows + 1 < C) & (place + 1 < tokens), state_heads)
                reach = tl.exp2(tl.cumsum(moved, 0, reverse=True))
            reach = tl.where(seen, reach, 0.0)
            sum_of_all = tl.sum(load_decay(decays, place, place < tokens, state_heads), 0)
            whole = tl.exp2(sum_of_all) * kept
        elif DECAY == 2:
            decays = load_columns(
                g + (batch * tokens * state_heads + head) * K, here, rows, state_heads * K, dims, tokens
            )
            decays = tl.maximum(decays.to(tl.float32) * LOG2E, FLOOR)
            if REVERSE:
                if READ_BEFORE:
                    chosen = (rows[:, None] < rows[None, :]).to(tl.float16)
                else:
                    chosen = (rows[:, None] <= rows[None, :]).to(tl.float16)
            else:
                chosen = (rows[:, None] > rows[None, :]).to(tl.float16)
            high, low = in_halves(decays)
            reach = tl.exp2(tl.dot(low, chosen, tl.dot(high, chosen)))
            if HAS_DOCS:
                reach = tl.where(seen[None, :], reach, 0.0)
            sum_of_all = tl.sum(decays, 1)
            whole = tl.exp2(sum_of_all) * kept
        else:
            reach = tl.where(seen, 1.0, 0.0)
            sum_of_all = 0.0
            whole = kept
        if (DECAY > 0) or HAS_DOCS:
            total = total * (whole[:, None] if DECAY == 2 else whole)
            norm = norm * whole
            span = span + sum_of_all
            if HAS_DOCS:
                span = tl.where(kept > 0.0, span, float("-inf"))
        for member in range(group):
            # not a transposed register tile: the columns come from memory
            part = load_columns(x + member * K, here, rows, heads * K, dims, tokens)
            other = load_rows(y + member * V, here, rows, heads * V, values, tokens)
            if DECAY == 2:
                part = (part.to(tl.float32) * reach).to(other.dtype)
            elif (DECAY == 1) or HAS_DOCS:
                part = (part.to(tl.float32) * reach[None, :]).to(other.dtype)
            if NORMALIZE:
                if REVERSE:
                    lines = (batch * tokens + place) * heads + head * group + member
                    factor = tl.load(weight + lines, mask=place < tokens, other=0.0)
                    norm += tl.sum(part.to(tl.float32) * factor[None, :], 1)
                else:
                    norm += tl.sum(part.to(tl.float32), 1)
            total = tl.dot(part, other, total, input_precision=PRECISION)
    if HAS_TOTALS:
        at = line * segments + segment
        tl.store(totals + at * K * V + square, total)
        if tile_of_values == 0:
            if NORMALIZE:
                tl.store(total_norms + at * K + dims, norm)
            if DECAY == 2:
                tl.store(total_spans + at * K + dims, span)
            else:
                tl.store(total_spans + at, span)


@triton.jit
def carry_kernel(
    totals, spans, carries, final, segments, size, width, features,
    REVERSE: tl.constexpr, HAS_FINAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Totals [B, M, segments, size] -> what enters each segment, and what leaves the last one.

    `width` numbers share one of the `features` spans of a segment.
    """
    line = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    carry = tl.zeros([BLOCK], tl.float32)
    for step in range(0, segments):
        segment = segments - 1 - step if REVERSE else step
        at = line * segments + segment
        tl.store(carries + at * size + place, carry.to(carries.dtype.element_ty), mask=inside)
        span = tl.load(spans + at * features + place // width, mask=inside, other=0.0)
        carry = carry * tl.exp2(span) + tl.load(totals + at * size + place, mask=inside, other=0.0)
    if HAS_FINAL:
        tl.store(final + line * size + place, carry, mask=inside)
