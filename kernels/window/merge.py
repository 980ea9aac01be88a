"""Softmax partials over disjoint keys become one, on the scale of their common row maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.window.reference import Weighted


def merge(first: Weighted, second: Weighted) -> Weighted:
    """The partial over both sets of keys: exactly what one softmax over all of them would give.

    Args:
        first, second: numerator [B, T, H, V], denominator [B, T, H] (zero where nothing is seen), maximum [B, T, H].
    """
    tops = [top.masked_fill(denominator == 0, -torch.inf) for _, denominator, top in (first, second)]
    top = torch.maximum(*tops)
    top = top.masked_fill(top == -torch.inf, 0.0)
    scales = [(own - top).exp() for own in tops]
    numerator = first[0] * scales[0][..., None] + second[0] * scales[1][..., None]
    return numerator, first[1] * scales[0] + second[1] * scales[1], top


def add_sink(weighted: Weighted, logit: Tensor) -> Weighted:
    """A key without a value: exp(logit) joins every row's sum of weights, and the logit its maximum.

    Args:
        weighted: a partial, see `merge`.
        logit: [H].
    """
    numerator, denominator, _ = weighted
    one = torch.ones_like(denominator)
    return merge(weighted, (torch.zeros_like(numerator), one, logit.to(one.dtype) * one))
