"""What the Triton kernels of the mixing matrix share: tiles of both matrices, and the slope of what they differ by."""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.kernels.window.triton_common import LOG2E, capped

SMALLEST: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def sees(queries, key, code, codes, tokens, HAS_CODES: tl.constexpr):
    """[M, N]: keys of a query's own document, no later than it."""
    seen = (key[None, :] <= queries[:, None]) & (queries < tokens)[:, None]
    if HAS_CODES:
        other = tl.load(codes + key, mask=key < tokens, other=-1)
        seen &= (other[None, :] == code[:, None]) & (other >= 0)[None, :]
    return seen


@triton.jit
def totals(high, low, places, there, SIZE: tl.constexpr, HAS_DECAY: tl.constexpr):
    """Both parts of the sums of log decays [SIZE] at some places, zeros where there are none."""
    if HAS_DECAY:
        return tl.load(high + places, mask=there, other=0.0), tl.load(low + places, mask=there, other=0.0)
    return tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)


@triton.jit
def of_rows(log_sum, rest, pull, slope, lines, real, NORMALIZED: tl.constexpr):
    """What `product_gradient` takes of rows [M]; the middle two are anything where nothing is normalized."""
    own_sum = tl.load(log_sum + lines, mask=real, other=0.0)
    own_slope = tl.load(slope + lines, mask=real, other=0.0)
    if NORMALIZED:
        own_rest = tl.load(rest + lines, mask=real, other=0.0)
        return own_sum, own_rest, tl.load(pull + lines, mask=real, other=0.0), own_slope
    return own_sum, own_slope, own_slope, own_slope


@triton.jit
def teacher_tile(
    query, tile, queries, key, seen, window, scaling, cap, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] of the softmax, -inf where it does not look."""
    score = tl.dot(query, tl.trans(tile), input_precision=PRECISION) * scaling
    near = seen
    if HAS_WINDOW:
        near = seen & (queries[:, None] - key[None, :] < window)
    return tl.where(near, capped(score, cap, HAS_CAP), float("-inf"))


@triton.jit
def decayed(product, at_high, at_low, key_high, key_low, seen, HAS_DECAY: tl.constexpr):
    """Weights [M, N] before they are normalized, and the decay [M, N] in them; without one, anything."""
    if HAS_DECAY:
        fade = faded(at_high, at_low, key_high, key_low, seen)
        return product * fade, fade
    return product, product


@triton.jit
def faded(at_high, at_low, key_high, key_low, seen):
    """exp(total of the query - total of the key) [M, N]; each total is the sum of two float32 numbers."""
    apart = (at_high[:, None] - key_high[None, :]) + (at_low[:, None] - key_low[None, :])
    return tl.exp2(tl.where(seen, apart, 0.0) * LOG2E)


@triton.jit
def inverse(mass):
    """1 / mass, zero where there is none."""
    return tl.where(mass == 0.0, 0.0, 1.0 / tl.where(mass == 0.0, 1.0, mass))


@triton.jit
def pulled(share, weight, SQUARES: tl.constexpr):
    """Derivative [M, N] of what a row differs by in the student's weights."""
    if SQUARES:
        return 2.0 * (weight - share)
    return tl.where(weight >= SMALLEST, -share / tl.maximum(weight, SMALLEST), 0.0)


@triton.jit
def product_gradient(
    score, product, seen, log_sum, rest, pull, slope, NORMALIZED: tl.constexpr, SQUARES: tl.constexpr
):
    """Derivative [M, N] in the student's weights before they are normalized, times each row's `slope`.

    Args:
        score, product: tiles of teacher and student.
        log_sum, rest, pull, slope: [M] of the rows: log of the teacher's sum, inverse of the student's, what
            normalizing takes off, and the gradient that comes in.
    """
    share = tl.exp2((score - log_sum[:, None]) * LOG2E)
    if NORMALIZED:
        found = (pulled(share, product * rest[:, None], SQUARES) + pull[:, None]) * rest[:, None]
    else:
        found = pulled(share, product, SQUARES)
    return tl.where(seen, found * slope[:, None], 0.0)


@triton.jit
def spread(gradient, features, found, PRECISION: tl.constexpr):
    """found + gradient @ features; share / weight passes what float16 holds."""
    if features.dtype == tl.float16:
        return tl.dot(gradient, features.to(tl.float32), found, input_precision=PRECISION)
    return tl.dot(gradient.to(features.dtype), features, found, input_precision=PRECISION)
