"""All steps of the systems of a tile of tokens: their keys and the state before them stay where a program computes."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.conjugate.triton_step import LOWEST, TINY, scale
from linearize.kernels.gated_linear.triton_common import (
    coordinates,
    load_columns,
    load_document,
    load_rows,
    load_state,
)


@triton.jit
def chunk_kernel(
    k, v, g, docs, target, ridge, out, states, norms, carries, carry_norms, spans,
    steps, tokens, tiles, periods, per_segment, segments,
    heads: tl.constexpr, state_heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    TILES: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x [B, T, H, K] of one tile and query head; a period is one tile (TILES = 1), and V = K.

    A step multiplies the tile's directions by the state that enters it and by the keys within it, as linear attention
    does; what is left, directions and solutions are in float32, rounded only where they are multiplied, and there of a
    length of about one (`reference.scale`).
    """
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    group: tl.constexpr = heads // state_heads
    state_head = head // group
    line = batch * state_heads + state_head
    rows, dims = tl.arange(0, C), tl.arange(0, K)
    first = tile * C
    place = first + rows
    inside = place < tokens
    reach = tl.where(inside, 1.0, 0.0)
    weights = tl.where((rows[:, None] >= rows[None, :]) & inside[:, None], 1.0, 0.0)
    if HAS_DECAY:
        g += batch * tokens * state_heads + state_head
        total, rest, _, _ = coordinates(g, first, rows, first, tokens, state_heads, C)
        reach = reach * tl.exp2(total + rest)
        # of later keys the difference is above zero, and may be far
        since = (total[:, None] - total[None, :]) + (rest[:, None] - rest[None, :])
        weights = weights * tl.exp2(tl.minimum(since, 0.0))
    if HAS_DOCS:
        owner = load_document(docs, batch, place, tokens)
        before = load_document(docs, batch, first - 1, tokens)
        reach = tl.where(owner == before, reach, 0.0)
        weights = tl.where(owner[:, None] == owner[None, :], weights, 0.0)
    keys = k + (batch * tokens * state_heads + state_head) * K
    across = load_columns(keys, first, rows, state_heads * K, dims, tokens)
    values = load_rows(
        v + (batch * tokens * state_heads + state_head) * K, first, rows, state_heads * K, dims, tokens
    )
    stored = (states, norms, carries, carry_norms, spans)
    square = dims[:, None] * K + dims[None, :]
    decay: tl.constexpr = 1 if HAS_DECAY else 0
    state = load_state(
        stored,
        line,
        tile,
        periods,
        tile // per_segment,
        segments,
        square,
        dims,
        K,
        K,
        decay,
        HAS_CARRY,
        False,
        False,
    )
    diagonal = tl.load(ridge + head * K + dims)
    start = (batch * tokens * heads + head) * K
    left = load_rows(target + start, first, rows, heads * K, dims, tokens).to(tl.float32)
    found = tl.zeros([C, K], tl.float32)
    size = tl.sum(left * left, 1)
    held = scale(size)
    along = (held * left).to(values.dtype)
    for _ in range(steps):
        read = along.to(tl.float32) if WIDE else along
        turned = tl.dot(read, state, input_precision=PRECISION) * reach[:, None]
        scores = tl.dot(along, across, input_precision=PRECISION) * weights
        turned = tl.dot(scores.to(values.dtype), values, turned, input_precision=PRECISION)
        exact = along.to(tl.float32)
        turned += exact * diagonal[None, :]
        # once solved, all that is left is rounding, which may say anything of the direction
        least = LOWEST * tl.sum(exact * exact, 1)
        length = (size / (tl.maximum(tl.sum(exact * turned, 1), least) + TINY))[:, None] * held
        found += length * exact
        left -= length * turned
        after = tl.sum(left * left, 1)
        direction = left + (after / (size + TINY))[:, None] / held * exact
        held = scale(after)
        along = (held * direction).to(values.dtype)
        size = after
    spot = place[:, None] * (heads * K) + dims[None, :]
    tl.store(out + start + spot, found, mask=inside[:, None])
