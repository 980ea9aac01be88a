"""What the forward and the backward kernel of short_conv share: reading inputs, and which of them a token sees."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def document(code):
    """Document number of a code: d, or -1 - d for padding in document d."""
    return tl.where(code < 0, -1 - code, code)


@triton.jit
def load_rows(
    x, start, base, positions, columns, tokens, channels, TAPS: tl.constexpr, HAS_START: tl.constexpr
):
    """Rows `positions` [R] of one sequence, [R, C] float32: the carried inputs before 0, zeros beyond either end.

    `x` and `start` point at the sequence; `base` is the first of the tile's positions and may be an int64.
    """
    lanes = (columns < channels)[None, :]
    inside = (positions >= 0) & (positions < tokens)
    steps = (positions - base)[:, None] * channels + columns[None, :]
    found = tl.load(x + tl.cast(base, tl.int64) * channels + steps, mask=inside[:, None] & lanes, other=0.0)
    found = found.to(tl.float32)
    if HAS_START:
        before = (positions < 0) & (positions >= 1 - TAPS)
        rows = tl.where(before, positions + (TAPS - 1), 0)
        past = tl.load(
            start + rows[:, None] * channels + columns[None, :], mask=before[:, None] & lanes, other=0.0
        )
        found += past.to(tl.float32)
    return found


@triton.jit
def load_codes(codes, positions, tokens):
    """Codes [R] of the positions; what came before the first token is of document 0."""
    return tl.load(codes + positions, mask=(positions >= 0) & (positions < tokens), other=0)
