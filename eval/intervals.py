"""95 % intervals: bootstrap over windows for means of tokens, Wilson's for shares."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 2000
Z = 1.959963984540054
"""Of a normal distribution, 95 % lie within so many standard deviations."""


def bootstrap(sums: ArrayLike, counts: ArrayLike, seed: int = 0) -> tuple[float, float, float]:
    """Mean of tokens and its percentile interval, with whole windows drawn again (Efron 1979).

    Tokens of one window depend on each other; windows nearly do not.

    Args:
        sums: [N] sum of the values of each window's tokens.
        counts: [N] how many tokens those are; windows without any are left out.
        seed: of the draws.

    Returns:
        (mean, low, high); NaN where there is no token, the interval as wide as the line where there is one window.
    """
    total, tokens = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    total, tokens = total[tokens > 0], tokens[tokens > 0]
    if not len(tokens):
        return math.nan, math.nan, math.nan
    mean = float(total.sum() / tokens.sum())
    if len(tokens) == 1 or not np.isfinite(total).all():
        return mean, -math.inf, math.inf
    drawn = np.random.default_rng(seed).integers(len(tokens), size=(DRAWS, len(tokens)))
    means = total[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return mean, float(low), float(high)


def wilson(right: float, items: int) -> tuple[float, float]:
    """Interval of a share (Wilson 1927): honest near 0 and 1, where the normal one is not.

    Args:
        right: how many items are right; a fraction counts for a part.
        items: of so many, at least 1.
    """
    share, z2 = right / items, Z * Z
    middle = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = Z / (1 + z2 / items) * math.sqrt(share * (1 - share) / items + z2 / (4 * items * items))
    # rounding must not put the share itself outside
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))
