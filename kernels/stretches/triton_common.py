"""What the Triton kernels of stretches share: on which level a key lies, what of a chunk is written where, shares."""

from __future__ import annotations

import triton
import triton.language as tl

WRITTEN: tl.constexpr = tl.constexpr(1)
"""Of a chunk and a state: some of its tokens write to it."""
LIVE: tl.constexpr = tl.constexpr(2)
"""Queries read what enters."""
CARRIED: tl.constexpr = tl.constexpr(4)
"""What enters is something, and is still of the state when the chunk ends."""


@triton.jit
def level_of(apart, MOST: tl.constexpr):
    """How many binary digits the bits `apart` of two blocks have, at most MOST: what a float's exponent says."""
    exponent = (apart.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return tl.minimum(tl.maximum(exponent, 0), MOST)


@triton.jit
def load_blocks(place, batch, first, rows, tokens, BITS: tl.constexpr):
    """Block of each token in its document; 2^BITS tokens are one."""
    return tl.load(place + batch * tokens + tl.minimum(first + rows, tokens - 1)) >> BITS


@triton.jit
def load_bound(bounds, batch, chunk, chunks):
    """Place of the token that would come first in a chunk, if the document before went on; see `chunk.bounds`."""
    return tl.load(bounds + batch * (chunks + 1) + chunk)


@triton.jit
def is_live(bound, level, C: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Whether a chunk that begins at place `bound` reads the state of `level`; LEVELS is that of the whole past."""
    bit = (bound >> BITS >> tl.maximum(level - 1, 0)) & 1
    found = tl.where(level == 0, bound & ((1 << BITS) - 1), bit)
    far = (bound + (C - 1)) >> tl.minimum(BITS + LEVELS - 1, 31)
    return tl.where(level == LEVELS, tl.where(bound != 0, far, 0), found) != 0


@triton.jit
def is_carried(bound, following, level, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Whether what the state of `level` holds at `bound` is something, and is still of it at `following`.

    Where both are one place the chunk is padding behind a text, whose last token that is, or has one token, and is
    the last: a state then is zero where it holds nothing.
    """
    size = tl.minimum(BITS + level, 30)
    same = ((bound >> size) == (following >> size)) & ((bound & ((1 << size) - 1)) != 0)
    return tl.where(level == LEVELS, bound != 0, same) | (bound == following)


@triton.jit
def written(blocks, inside, following, level, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Which tokens write to the state of `level` that leaves the chunk; `inside`: the document at its end is theirs."""
    same = (blocks >> level) == (following >> BITS >> level)
    first = (((blocks >> tl.maximum(level - 1, 0)) & 1) == 0) | (level == 0)
    return inside & ((same & first) | (level == LEVELS))


@triton.jit
def stretch_levels(blocks, bound, level, BITS: tl.constexpr, LEVELS: tl.constexpr, MOST: tl.constexpr):
    """On which level the state of `level`, of what lies before place `bound`, is for queries in `blocks`."""
    there = level_of(blocks ^ (bound >> BITS >> level << level), MOST)
    return tl.where(level == LEVELS, MOST, there)


@triton.jit
def stretch_shares(
    shares, blocks, there, rows, inside, level, stride,
    LEVELS: tl.constexpr, MOST: tl.constexpr, OLDER: tl.constexpr,
):  # fmt: skip
    """With what each query weighs the state of `level`, which is on level `there` for it.

    Args:
        shares: at the chunk's first token and the query's head.
        stride: between tokens.
    """
    found = tl.load(shares + rows * stride + there, mask=inside, other=0.0)
    if OLDER:
        # there, MOST is LEVELS
        far = blocks >> (MOST - 1) != 0
        last = tl.load(shares + rows * stride + MOST, mask=inside & far, other=0.0)
        found = tl.where(level == LEVELS, last, found - last)
    return found


@triton.jit
def pair_levels(own, other, MOST: tl.constexpr):
    """[own, other]: on which level keys of a chunk lie for its queries, or the other way round."""
    return level_of(own[:, None] ^ other[None, :], MOST)
