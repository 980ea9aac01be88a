"""Outputs and gradients of linear attention with a decay for every key dimension, chunk by chunk, on tensor cores.

Between a key s and a reader t of one block lies its middle: exp(G_t - G_s) = exp(G_t - G_middle) exp(G_middle - G_s),
so all pairs of a block are one product of two scaled tiles, as long as no factor overflows. Where a chunk forgets too
much for that, it is halved: pairs across the middle have factors of at most one, whatever the decays, and are a masked
product; the blocks on either side go on. Blocks of one token need no decay, so every decay is exact. How often a chunk
is halved follows from its own decays, inside the kernel: not at all while neither half forgets more than exp(-41).

The exponents G_t - G_middle are products of the log decays with a matrix of 0, 1 and -1: sums of their own terms, never
differences of long sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.gated_linear.triton_common import FLOOR, LOG2E, load_rows

CAP: tl.constexpr = tl.constexpr(60.0)
"""Largest exponent of two in a factor, so that a product of two, of pairs that nobody sees, is finite too."""


@triton.jit
def in_base_two(x):
    """Log decays as they are given -> base 2, float32."""
    return tl.maximum(x.to(tl.float32) * LOG2E, FLOOR)


@triton.jit
def under_decay(x, factor, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """A tile under its decays as products get it: WIDE where 16 bits could not hold it, which is float16.

    What tensor cores would cut off of a float32 is not there. Both sides of a pair are to be multiplied like that where
    a decay's gradient is what readers take less what is read of writers: pairs on one side of the decay are in both
    sums, and only what is the product of the same rounded numbers cancels.
    """
    y = x.to(tl.float32) * factor
    if not WIDE:
        y = y.to(x.dtype)
    elif PRECISION == "tf32":
        y = ((y.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return y


@triton.jit
def strongest(decays, rows, C: tl.constexpr):
    """Of [C, dims] the strongest decay of one token, and of one half of the chunk, both positive."""
    early = tl.sum(tl.where((rows < C // 2)[:, None], decays, 0.0), 0)
    halves = tl.minimum(early, tl.sum(decays, 0) - early)
    return -tl.min(tl.min(decays, 0), 0), -tl.min(halves, 0)


@triton.jit
def count_halvings(token, half):
    """How often a chunk of 64 is halved, at most six times."""
    count = 0
    for i in tl.static_range(6):
        count += tl.where(token * (32 >> i) > CAP, 1, 0)
    return tl.where(half > CAP, count, 0)


@triton.jit
def halvings(
    g, first, rows, tokens, state_heads: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr
):
    """The same for all K dimensions of a head, from memory."""
    token, half = 0.0, 0.0
    for part in range(K // BK):
        dims = part * BK + tl.arange(0, BK)
        decays = in_base_two(load_rows(g, first, rows, state_heads * K, dims, tokens))
        by_token, by_half = strongest(decays, rows, C)
        token, half = tl.maximum(token, by_token), tl.maximum(half, by_half)
    return count_halvings(token, half)


@triton.jit
def row_exponents(decays, rows, C: tl.constexpr):
    """Of a chunk that is not halved: decays from its middle up to each row, [C, dims], and up to the middle, [dims]."""
    early = tl.sum(tl.where((rows < C // 2)[:, None], decays, 0.0), 0)
    return tl.cumsum(decays, 0) - early[None, :], early


@triton.jit
def column_exponents(decays, rows, C: tl.constexpr):
    """The first of them for a transposed tile, [dims, C]."""
    early = tl.sum(tl.where((rows < C // 2)[None, :], decays, 0.0), 1)
    return tl.cumsum(decays, 1) - early[:, None]


@triton.jit
def row_sums(high, low, rows, middle, last):
    """Decays from `middle` up to and with `last` (less those from behind `last` to before `middle`), [C, dims]."""
    other = rows[None, :]
    after = (other >= middle[:, None]) & (other <= last[:, None])
    chosen = after.to(tl.float16) - ((other > last[:, None]) & (other < middle[:, None])).to(tl.float16)
    return tl.dot(chosen, low, tl.dot(chosen, high))


@triton.jit
def column_sums(high, low, rows, middle, last):
    """The same of transposed tiles, [dims, C]."""
    other = rows[:, None]
    after = (other >= middle[None, :]) & (other <= last[None, :])
    chosen = after.to(tl.float16) - ((other > last[None, :]) & (other < middle[None, :])).to(tl.float16)
    return tl.dot(low, chosen, tl.dot(high, chosen))


@triton.jit
def in_order(rows, CAUSAL: tl.constexpr, READ_BEFORE: tl.constexpr):
    """Which pairs (own row, other row) have their reader, the own row if CAUSAL, at or behind their key."""
    if CAUSAL:
        return rows[:, None] > rows[None, :] if READ_BEFORE else rows[:, None] >= rows[None, :]
    else:
        return rows[:, None] < rows[None, :] if READ_BEFORE else rows[:, None] <= rows[None, :]


@triton.jit
def level_pairs(rows, shift, final, CAUSAL: tl.constexpr, READ_BEFORE: tl.constexpr):
    """Which pairs (own row, other row) a level of blocks of 2^shift rows makes, and each row's middle.

    Before the `final` level those of a reader in the second and a key in the first half; CAUSAL: own rows read.
    """
    block = rows >> shift
    middle = (block << shift) + tl.maximum((1 << shift) >> 1, 1)
    second = rows >= middle
    own, other = (second, rows < middle) if CAUSAL else (rows < middle, second)
    across = own[:, None] & other[None, :]
    same = block[:, None] == block[None, :]
    return same & in_order(rows, CAUSAL, READ_BEFORE) & (across | final), middle
