"""States between periods: sums of phi(k) v^T over the keys behind, or of phi(q) do^T over the queries ahead.

One kernel scans both ways, a block of features and of values a program. A sequence is cut into segments that are
scanned side by side, each from nothing; gated_linear's `carry_kernel` sums the segments' totals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.taylor_linear.triton_common import (
    document,
    feature_table,
    load_code,
    load_factors_turned,
    load_rows,
)


@triton.jit
def scan_kernel(
    x, y, weight, codes, start, start_norm, states, norms, spans, totals, total_norms, total_spans, root,
    tokens, tiles, periods, per_segment, segments,
    x_heads: tl.constexpr, y_heads: tl.constexpr, state_heads: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_CODES: tl.constexpr, HAS_START: tl.constexpr,
    HAS_TOTALS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States [B, M, periods, F, V] that enter each period of TILES tiles, in the order of the scan.

    Forward x, y are k, v. REVERSE they are q, do of a state's `x_heads // state_heads` queries, and `weight` [B, T, H]
    the gradient of the denominators.
    """
    blocks: tl.constexpr = V // BV
    block, tile_of_values = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    segment = tl.program_id(1) % segments
    line = (tl.program_id(1) // segments).to(tl.int64)
    batch, head = line // state_heads, line % state_heads
    group: tl.constexpr = x_heads // state_heads
    shared: tl.constexpr = x_heads // y_heads
    rows, values = tl.arange(0, C), tile_of_values * BV + tl.arange(0, BV)
    features = block * BF + tl.arange(0, BF)
    first, second, has_first, has_second, factor = feature_table(block, root, D, BF)
    square = features[:, None] * V + values[None, :]
    held = (features < F)[:, None]
    total = tl.zeros([BF, BV], tl.float32)
    norm = tl.zeros([BF], tl.float32)
    span = tl.cast(0.0, tl.float32)
    if HAS_START:  # noqa: SIM102
        if segment == (segments - 1 if REVERSE else 0):
            total = tl.load(start + line * F * V + square, mask=held, other=0.0)
            if NORMALIZE:
                norm = tl.load(start_norm + line * F + features, mask=features < F, other=0.0)
    begin = segment * per_segment * TILES
    count = tl.minimum(begin + per_segment * TILES, tiles) - begin
    for step in range(
        0, count * group
    ):  # members within: a loop of theirs would keep what they share in registers
        member = step % group
        tile = begin + count - 1 - step // group if REVERSE else begin + step
        here = tile * C
        edge = (tile % TILES == TILES - 1) | (tile == tiles - 1) if REVERSE else tile % TILES == 0
        if edge & (member == 0):
            at = line * periods + tile // TILES
            tl.store(states + at * F * V + square, total.to(states.dtype.element_ty), mask=held)
            if tile_of_values == 0:
                if NORMALIZE:
                    tl.store(norms + at * F + features, norm, mask=features < F)
                if block == 0:
                    tl.store(spans + at, span)
        place = here + rows
        inside = place < tokens
        seen = inside
        if HAS_CODES:
            before = document(load_code(codes, batch, here - 1, tokens))
            after = document(load_code(codes, batch, here + C - 1, tokens))
            code = load_code(codes, batch, place, tokens)
            seen = seen & (document(code) == before if REVERSE else code == after)
            kept = tl.where((before == after) | (member > 0), 1.0, 0.0)
            total, norm = total * kept, norm * kept
            span = tl.where(before == after, span, float("-inf"))
        own = head * group + member
        a, b = load_factors_turned(
            x + (batch * tokens * x_heads + own) * D, place, x_heads * D, inside, first, second, has_first, has_second
        )  # fmt: skip
        part = tl.where(seen[None, :], a * b * factor[:, None], 0.0)
        other = load_rows(
            y + (batch * tokens * y_heads + own // shared) * V, place, y_heads * V, values, tokens, V
        )
        if NORMALIZE:
            if REVERSE:
                lines = (batch * tokens + place) * x_heads + own
                norm += tl.sum(part * tl.load(weight + lines, mask=inside, other=0.0)[None, :], 1)
            else:
                norm += tl.sum(part, 1)
        if WIDE:
            total = tl.dot(part, other.to(tl.float32), total, input_precision=PRECISION)
        else:
            total = tl.dot(part.to(other.dtype), other, total, input_precision=PRECISION)
    if HAS_TOTALS:
        at = line * segments + segment
        tl.store(totals + at * F * V + square, total, mask=held)
        if tile_of_values == 0:
            if NORMALIZE:
                tl.store(total_norms + at * F + features, norm, mask=features < F)
            if block == 0:
                tl.store(total_spans + at, span)
