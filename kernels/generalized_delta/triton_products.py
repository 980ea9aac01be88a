"""Products of all readers of a chunk with all its writers, under a decay for every key dimension.

`gated_linear.triton_levels` says how: one product of two scaled tiles, the exponents counted from the chunk's middle,
while neither half of the chunk forgets more than float32 holds; else a masked product for every halving of the chunk,
whose factors are at most one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_delta.triton_common import load_columns, load_rows
from linearize.kernels.gated_linear.triton_common import in_halves
from linearize.kernels.gated_linear.triton_levels import CAP, column_sums, in_base_two, level_pairs, row_sums
from linearize.kernels.generalized_delta.triton_common import reader_factors, turned_writer_factors


@triton.jit
def scaled(x, factor, WIDE: tl.constexpr):
    """A tile under its decays, as an operand: float16 could not hold them, so its products are of float32."""
    y = x.to(tl.float32) * factor
    if not WIDE:
        y = y.to(x.dtype)
    return y


@triton.jit
def products(
    x, b, k, g, first, rows, own_stride, stride, tokens,
    K: tl.constexpr, BK: tl.constexpr, STRICT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk that is not halved: readers x (of a if STRICT, else of q) with b and with k, [C, C] each, unmasked."""
    C: tl.constexpr = rows.shape[0]
    with_b = tl.zeros([C, C], tl.float32)
    with_k = tl.zeros([C, C], tl.float32)
    for block in range(K // BK):
        dims = block * BK + tl.arange(0, BK)
        up = reader_factors(g, first, rows, stride, dims, tokens, STRICT)
        own = scaled(load_rows(x, first, rows, own_stride, dims, tokens), up, WIDE)
        down = turned_writer_factors(g, first, rows, stride, dims, tokens)
        other = scaled(load_columns(b, first, rows, stride, dims, tokens), down, WIDE)
        with_b = tl.dot(own, other, with_b, input_precision=PRECISION)
        other = scaled(load_columns(k, first, rows, stride, dims, tokens), down, WIDE)
        with_k = tl.dot(own, other, with_k, input_precision=PRECISION)
    return with_b, with_k


@triton.jit
def halved_products(
    x, y, g, first, rows, own_stride, stride, tokens, levels,
    K: tl.constexpr, BK: tl.constexpr, STRICT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk that is halved `levels` times: readers x with the writers y, zero for later writers."""
    C: tl.constexpr = rows.shape[0]
    shift: tl.constexpr = 1 if STRICT else 0
    result = tl.zeros([C, C], tl.float32)
    for level in range(0, levels + 1):
        # always `rows`, but the compiler does not know it: nothing of a level may wait for it in registers
        lanes = rows + (level >> 3)
        pairs, middle = level_pairs(lanes, 6 - level, level == levels, True, STRICT)
        found = tl.zeros([C, C], tl.float32)
        for block in range(K // BK):
            dims = block * BK + tl.arange(0, BK)
            high, low = in_halves(in_base_two(load_rows(g, first, lanes, stride, dims, tokens)))
            factor = tl.exp2(tl.minimum(row_sums(high, low, lanes, middle, lanes - shift), CAP))
            own = scaled(load_rows(x, first, lanes, own_stride, dims, tokens), factor, WIDE)
            tl.debug_barrier()  # the other tile is not loaded before there are registers for it
            high, low = in_halves(in_base_two(load_columns(g, first, lanes, stride, dims, tokens)))
            factor = tl.exp2(tl.minimum(-column_sums(high, low, lanes, middle, lanes), CAP))
            other = scaled(load_columns(y, first, lanes, stride, dims, tokens), factor, WIDE)
            found = tl.dot(own, other, found, input_precision=PRECISION)
        result = tl.where(pairs, found, result)
        tl.debug_barrier()  # nor the next level's
    return result
