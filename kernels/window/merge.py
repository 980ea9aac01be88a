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


Normalized = tuple[Tensor, Tensor, Tensor | None]


def merge_normalized(first: Normalized, second: Normalized) -> Normalized:
    """The same for partials as kernels give them: divided by their sums, with the logarithm of the sum.

    Args:
        first, second: out [B, T, H, V], log of the sum [B, T, H] (-inf where nothing is seen), and the largest score
            [B, T, H] (zero there), or None.
    """
    highest = torch.maximum(first[1], second[1]).detach()
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    scales = [(log_sum - highest).exp() for log_sum in (first[1], second[1])]
    total = scales[0] + scales[1]
    some = total > 0
    safe = torch.where(some, total, 1.0)
    shares = [(scale / safe)[..., None] for scale in scales]
    out = (first[0] * shares[0] + second[0] * shares[1]).to(first[0].dtype)
    log_sum = torch.where(some, highest + safe.log(), -torch.inf)
    if first[2] is None or second[2] is None:
        return out, log_sum, None
    tops = [
        top.masked_fill(own == -torch.inf, -torch.inf) for _, own, top in (first, second) if top is not None
    ]
    return out, log_sum, torch.maximum(*tops).masked_fill(~some, 0.0)
