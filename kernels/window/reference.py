"""The definition: dense scores under a visibility mask. Quadratic; float64 in, float64 out."""

from __future__ import annotations

import torch
from torch import Tensor

Weighted = tuple[Tensor, Tensor, Tensor]


def softmax_scores(q: Tensor, k: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Scaled, optionally tanh-capped scores of grouped heads.

    Args:
        q: [..., T, H, K].
        k: [..., S, N, K], N dividing H.

    Returns:
        [..., H, T, S].
    """
    *lead, tokens, heads, width = q.shape
    kv_heads, seen = k.shape[-2], k.shape[-3]
    q_grouped = q.reshape(*lead, tokens, kv_heads, heads // kv_heads, width)
    products = torch.einsum("...tngk,...snk->...ngts", q_grouped, k)
    scores = products.reshape(*lead, heads, tokens, seen) * scaling
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def weigh(scores: Tensor, visible: Tensor, v: Tensor | None) -> Weighted:
    """Exponentials of the scores less the row maximum, and what they weigh.

    The maximum is not detached: under a normalizer shared with another branch it is part of the function
    (LoLCATs does the same), and its gradient changes dq and dk.

    Args:
        scores: [..., H, T, S].
        visible: bool, broadcastable to `scores`.
        v: [..., S, N, V], or None for the weights themselves in the numerator's place (as if v were the identity).

    Returns:
        numerator [..., T, H, V] ([..., T, H, S] without v), denominator [..., T, H], maximum [..., T, H] (zero in
        rows that see nothing).
    """
    *lead, heads, tokens, seen = scores.shape
    scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.amax(-1)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - top[..., None]).exp()
    denominator, top = weights.sum(-1).transpose(-1, -2), top.transpose(-1, -2)
    if v is None:
        return weights.transpose(-2, -3), denominator, top
    kv_heads, width = v.shape[-2:]
    grouped = weights.reshape(*lead, kv_heads, heads // kv_heads, tokens, seen)
    numerator = torch.einsum("...ngts,...snv->...tngv", grouped, v).reshape(*lead, tokens, heads, width)
    return numerator, denominator, top


def window_reference(
    q: Tensor, k: Tensor, v: Tensor | None, visible: Tensor, *, scaling: float, softcap: float | None = None
) -> Weighted:
    """Softmax partial of every query over the keys that `visible` [B, T, S] grants it.

    Args:
        q, k, v: [B, T, H, K], [B, S, N, K], [B, S, N, V]; v None gives weights, see `weigh`.

    Returns:
        numerator [B, T, H, V], denominator [B, T, H], row maximum [B, T, H].
    """
    return weigh(softmax_scores(q, k, scaling, softcap), visible[:, None], v)
