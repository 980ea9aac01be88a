"""Operands of float32 products rounded as bfloat16 is, which Triton's interpreter does not have."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded_pairs(pairs, tile):
    """In the place of generalized_delta's `weighed`."""
    bits = pairs.to(tl.int32, bitcast=True)
    return ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def rounded_operand(x, factor, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """In the place of `under_decay`."""
    return rounded_pairs(x.to(tl.float32) * factor, x)
