"""(I + a)^-1 of a strictly lower [64, 64] in registers, by blocks of 16, 32 and 64.

Blocks on the diagonal are inverted side by side, a warp each: with X the inverse of blocks of s tokens and B what joins
two neighbours, X - X B X is the inverse for blocks of 2 s (as `gated_delta.triton_inverse` does it for one block). So
every intermediate is an inverse of a part of the matrix, which the powers of a Neumann series are not. No product here
has 64 rows in one matrix: wgmma, whose single tf32 products were wrong on Hopper in places, takes none of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def diagonal(a, SIZE: tl.constexpr):
    """[64, 64] -> its blocks on the diagonal, [64 / SIZE, SIZE, SIZE]."""
    COUNT: tl.constexpr = 64 // SIZE
    block = tl.arange(0, COUNT)
    same = (block[:, None] == block[None, :])[:, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(a, [COUNT, SIZE, COUNT, SIZE]), 0.0), 2)


@triton.jit
def doubled(found, a, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of diagonal blocks of SIZE in [count, n, n] -> those of twice the size."""
    row, column = tl.arange(0, a.shape[1])[:, None], tl.arange(0, a.shape[1])[None, :]
    joins = (row // (2 * SIZE) == column // (2 * SIZE)) & (row // SIZE != column // SIZE)
    half = tl.dot(found, tl.where(joins[None, :, :], a, 0.0), input_precision=PRECISION)
    return found - tl.dot(half, found, input_precision=PRECISION)


@triton.jit
def unit_inverse(a, PRECISION: tl.constexpr):
    """(I + a)^-1, float32."""
    place = tl.arange(0, 16)
    row, column = place[None, :, None], place[None, None, :]
    blocks = diagonal(a, 16)
    found = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, blocks, 0.0)
    found = doubled(found, blocks, 2, PRECISION)
    found = doubled(found, blocks, 4, PRECISION)
    found = doubled(found, blocks, 8, PRECISION)
    pair = tl.arange(0, 2)
    same = (pair[:, None] == pair[None, :])[None, :, None, :, None]
    wide = tl.where(same, tl.reshape(found, [2, 2, 16, 1, 16]), 0.0)
    wide = doubled(tl.reshape(wide, [2, 32, 32]), diagonal(a, 32), 16, PRECISION)
    # the last joint is one block: first inverse, second inverse and what lies below and between them
    first = tl.sum(tl.where((pair == 0)[:, None, None], wide, 0.0), 0)
    second = tl.sum(tl.where((pair == 1)[:, None, None], wide, 0.0), 0)
    below = (pair[:, None] > pair[None, :])[:, None, :, None]
    joint = tl.sum(tl.sum(tl.where(below, tl.reshape(a, [2, 32, 2, 32]), 0.0), 2), 0)
    half = tl.dot(second, joint, input_precision=PRECISION)
    low = tl.dot(half, first, input_precision=PRECISION)
    square = tl.where((pair[:, None] == pair[None, :])[:, None, :, None], wide[:, :, None, :], 0.0)
    square = tl.where(below, -low[None, :, None, :], square)
    return tl.reshape(square, [64, 64])
