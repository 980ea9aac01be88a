"""Softmax over a few keys of each query's own: the pinned first tokens of its document."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels.window.reference import Weighted, softmax_scores, weigh


def window_pinned(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scaling: float, softcap: float | None = None
) -> Weighted:
    """Softmax partial of every query over its own S keys; O(T S) memory.

    Args:
        q: [B, T, H, K].
        k, v: [B, T, S, N, K or V].
        visible: [B, T, S] bool.

    Returns:
        numerator [B, T, H, V], denominator [B, T, H], row maximum [B, T, H].
    """
    scores = softmax_scores(q[:, :, None], k, scaling, softcap)
    numerator, denominator, top = weigh(scores, visible[:, :, None, None], v)
    return numerator[:, :, 0], denominator[:, :, 0], top[:, :, 0]
