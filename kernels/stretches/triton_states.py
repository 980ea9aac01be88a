"""States of all stretches: what chunks write to each, and the loop over chunks, forward and for gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_documents, load_rows
from linearize.kernels.stretches.triton_common import (
    CARRIED,
    LIVE,
    WRITTEN,
    is_carried,
    is_live,
    load_blocks,
    load_bound,
    written,
)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def write_kernel(
    v, place, bounds, docs, writers, states, marks, tokens, chunks,
    state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr, OLDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """N of one chunk into `states` [B, M, S, chunks, K, V], where there is one; what it does into `marks`.

    `marks` [B, M, S, chunks] has the bits of `triton_common`.
    """
    parts: tl.constexpr = V // BV
    part = tl.program_id(0) % parts
    chunk = (tl.program_id(0) // parts) % chunks
    row_head = (tl.program_id(0) // (parts * chunks)).to(tl.int64)
    batch, head = row_head // state_heads, row_head % state_heads
    first = chunk * C
    rows, dims, values = tl.arange(0, C), tl.arange(0, K), part * BV + tl.arange(0, BV)
    blocks = load_blocks(place, batch, first, rows, tokens, BITS)
    bound = load_bound(bounds, batch, chunk, chunks)
    following = load_bound(bounds, batch, chunk + 1, chunks)
    document = load_documents(docs, batch, first, rows, tokens)
    inside = (document == tl.load(docs + batch * tokens + tl.minimum(first + C, tokens) - 1)) & (
        first + rows < tokens
    )
    kind = v.dtype.element_ty
    value = load_rows(
        v + (batch * tokens * state_heads + head) * V, first, rows, state_heads * V, values, tokens
    )
    value = value.to(tl.float32)
    keys = tl.load(writers + (row_head * chunks + chunk) * K * C + dims[:, None] * C + rows[None, :])
    for level in range(LEVELS + OLDER):
        writes = written(blocks, inside, following, level, BITS, LEVELS)
        some = tl.max(writes.to(tl.int32), 0)
        at = (row_head * (LEVELS + OLDER) + level) * chunks + chunk
        if part == 0:
            found = tl.where(is_live(bound, level, C, BITS, LEVELS), LIVE, 0)
            found += tl.where(is_carried(bound, following, level, BITS, LEVELS), CARRIED, 0)
            tl.store(marks + at, found + some * WRITTEN)
        if some > 0:
            own = tl.where(writes[:, None], value, 0.0).to(kind)
            added = tl.dot(keys, own, input_precision=PRECISION)
            tl.store(states + at * K * V + dims[:, None] * V + values[None, :], added.to(kind))


@triton.jit(do_not_specialize=["chunks"])
def states_kernel(
    removal, kept, marks, start, states, final, chunks,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, S: tl.constexpr,
    REVERSE: tl.constexpr, HAS_START: tl.constexpr, HAS_FINAL: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of one state: reads N from `states` and writes the entering state in its place.

    REVERSE: reads what queries want, writes the gradient of the state that leaves; `start` [B, M, S, K, V] is the
    gradient of the final state, `final` that of the carried one. What `marks` say is nothing is neither read nor kept.
    """
    parts: tl.constexpr = V // BV
    part = tl.program_id(0) % parts
    line = (tl.program_id(0) // parts).to(tl.int64)
    row_head = line // S
    dims, values = tl.arange(0, K), part * BV + tl.arange(0, BV)
    place = dims[:, None] * V + values[None, :]
    square = dims[None, :] * K + dims[:, None] if REVERSE else dims[:, None] * K + dims[None, :]
    wanted: tl.constexpr = LIVE if REVERSE else WRITTEN
    stored: tl.constexpr = CARRIED | WRITTEN if REVERSE else CARRIED | LIVE
    state = tl.zeros([K, BV], tl.float32)
    if HAS_START:
        state = tl.load(start + line * K * V + place)
    kind = states.dtype.element_ty
    everywhere = tl.zeros([K, BV], tl.int32)
    # what a chunk adds and keeps is fetched one chunk ahead, whether it adds anything two chunks ahead
    last = chunks - 1
    mark = tl.load(marks + line * chunks + (last if REVERSE else 0))
    mark_next = tl.load(marks + line * chunks + (tl.maximum(last - 1, 0) if REVERSE else tl.minimum(1, last)))
    chunk = last if REVERSE else 0
    added = tl.load(
        states + (line * chunks + chunk) * K * V + place, mask=(mark & wanted) + everywhere != 0, other=0.0
    )
    decay = tl.load(kept + row_head * chunks + chunk)
    for step in range(0, chunks):
        chunk = last - step if REVERSE else step
        following = tl.maximum(chunk - 1, 0) if REVERSE else tl.minimum(chunk + 1, last)
        after = tl.maximum(chunk - 2, 0) if REVERSE else tl.minimum(chunk + 2, last)
        at = states + (line * chunks + following) * K * V + place
        added_next = tl.load(at, mask=(mark_next & wanted) + everywhere != 0, other=0.0)
        decay_next = tl.load(kept + row_head * chunks + following)
        mark_after = tl.load(marks + line * chunks + after)
        entering = state.to(kind)
        at = states + (line * chunks + chunk) * K * V + place
        tl.store(at, entering, mask=(mark & stored) + everywhere != 0)
        carried = (mark & CARRIED) != 0
        state = added.to(tl.float32) + tl.where(carried, state * decay, 0.0)
        if DELTA:
            taken = tl.load(removal + (row_head * chunks + chunk) * K * K + square)
            entering = tl.where(carried, entering, tl.zeros([K, BV], kind))
            state = tl.dot(taken, entering, state, input_precision=PRECISION)
        # a value that is handed on as it came would keep Triton from fetching operands ahead
        mark = mark_next & (WRITTEN | LIVE | CARRIED)
        added, decay, mark_next = added_next, decay_next, mark_after
    if HAS_FINAL:
        tl.store(final + line * K * V + place, state)
