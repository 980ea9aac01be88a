"""The definition: dense weights of window and past under one normalizer. Quadratic; float64 in, float64 out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.window.merge import add_sink, merge
from linearize.kernels.window.reference import Weighted, softmax_scores, weigh


@dataclass(frozen=True)
class Layer:
    """What one call computes, tensors aside.

    Attributes:
        window: most tokens that a query's softmax sees, its own included; 0 for pure linear attention.
        least: fewest tokens that it sees once the text is long enough; `window` unless `reach` varies.
        scaling: factor on q.k in the window.
        prefix: keys that come before the first query (carried pinned keys, a carried window); query t stands at key
            `prefix + t`.
    """

    window: int
    least: int
    scaling: float
    prefix: int = 0


@dataclass(frozen=True)
class Weights:
    """Parameters of a call; None leaves a factor or the sink out.

    Attributes:
        query_map, key_map: [H, K, f] and [M, K, f], M = H or N.
        window_weight: [H] factor on the window's weights, one where there is only one branch.
        linear_weight: [H] factor on the past's weights.
        sink: [H] logit of a key without a value that every window sees.
    """

    query_map: Tensor
    key_map: Tensor
    window_weight: Tensor | None = None
    linear_weight: Tensor | None = None
    sink: Tensor | None = None


@dataclass(frozen=True)
class Pins:
    """Keys that the softmax of a whole document sees beside its window, and that the past's sums never see.

    Attributes:
        count: of a document.
        place: [B, T] int32, the first pinned key of each query's document, never falling along a row.
        past: [B, P + T] int32, `codes` as the past's sums see them: a pinned key is padding there, in its window too.
        asking: [B, T, H, K], what pinned keys behind the window are asked in place of q, or None.
    """

    count: int
    place: Tensor
    past: Tensor
    asking: Tensor | None = None


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """[softmax(x W), softmax(-x W)] per head: [B, T, N, K], [M, K, f] -> [B, T, M, 2 f]; heads shared in groups."""
    x = x.repeat_interleave(weight.shape[0] // x.shape[2], 2)
    y = torch.einsum("bthk,hkf->bthf", x, weight.to(x.dtype))
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


def document(codes: Tensor) -> Tensor:
    """Document number of a code: itself, or -1 - code where the token is padding."""
    return torch.where(codes >= 0, codes, -1 - codes)


def blended(
    scores: Tensor,
    products: Tensor,
    near: Tensor,
    far: Tensor,
    v: Tensor,
    weights: Weights,
    pinned: Weighted | None = None,
) -> tuple[Tensor, Tensor]:
    """Unnormalized output and sum of weights of queries over some keys.

    Args:
        scores: [..., H, T, S] scaled q.k.
        products: [..., H, T, S] phi(q).phi(k).
        near, far: bool masks of what the softmax and the past's sums see, broadcastable.
        v: [..., S, N, V].
        pinned: what the softmax sees beside these keys, see `merge`.

    Returns:
        [..., T, H, V] and [..., T, H].
    """
    numerator, denominator, top = weigh(scores, near, v)
    if pinned is not None:
        numerator, denominator, top = merge((numerator, denominator, top), pinned)
    if weights.sink is not None:
        numerator, denominator, _ = add_sink((numerator, denominator, top), weights.sink)
    if weights.window_weight is not None:
        share = weights.window_weight.to(denominator.dtype)
        numerator, denominator = numerator * share[:, None], denominator * share
    past = products * far
    if weights.linear_weight is not None:
        past = past * weights.linear_weight.to(past.dtype)[:, None, None]
    *lead, heads, tokens, seen = past.shape
    grouped = past.reshape(*lead, v.shape[-2], heads // v.shape[-2], tokens, seen)
    added = torch.einsum("...ngts,...snv->...tngv", grouped, v).reshape(*lead, tokens, heads, v.shape[-1])
    return numerator + added, denominator + past.sum(-1).transpose(-1, -2)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Row-wise quotient [B, T, H, V] / [B, T, H]; rows with no weight (padding) give zero instead of NaN."""
    empty = denominator == 0
    return numerator / denominator.masked_fill(empty, 1.0)[..., None]


def window_linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    layer: Layer,
    *,
    codes: Tensor,
    reach: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    pins: Pins | None = None,
) -> Tensor:
    """o_t = sum_j w_tj v_j / sum_j w_tj; see `window_linear`.

    Args:
        q: [B, T, H, K].
        k, v: [B, P + T, N, *].
        codes: [B, P + T], see `window_linear`.
        reach: [B, T] tokens that each query's window sees.
        state: carried sums [B, M, 2 f, V] and norms [B, M, 2 f] of document 0.
        pins: see `Pins`, or None.

    Returns:
        [B, T, H, V].
    """
    tokens, heads = q.shape[1:3]
    owner = document(codes[:, layer.prefix :])
    age = layer.prefix + torch.arange(tokens)[:, None] - torch.arange(k.shape[1])
    age = age.to(q.device)
    visible = (age >= 0) & (codes[:, None, :] == owner[..., None])
    near = visible & (age < reach[..., None])
    far = visible & (age >= reach[..., None])
    scores = softmax_scores(q, k, layer.scaling, None)
    if pins is not None:
        order = torch.arange(k.shape[1], device=q.device) - pins.place[..., None]
        beyond = far & (order >= 0) & (order < pins.count)
        if pins.asking is not None:
            asked = softmax_scores(pins.asking, k, layer.scaling, None)
            scores = torch.where(beyond[:, None], asked, scores)
        near, far = near | beyond, far & (pins.past[:, None, :] == owner[..., None])
    phi_q, phi_k = hedgehog(q, weights.query_map), hedgehog(k, weights.key_map)
    products = torch.einsum("bthf,bshf->bhts", phi_q, phi_k.repeat_interleave(heads // phi_k.shape[2], 2))
    numerator, denominator = blended(scores, products, near[:, None], far[:, None], v, weights)
    if state is not None:
        reader = phi_q * (owner == 0)[..., None, None]
        if weights.linear_weight is not None:
            reader = reader * weights.linear_weight[:, None]
        sums, norms = (x.repeat_interleave(heads // x.shape[1], 1) for x in state)
        numerator = numerator + torch.einsum("bthf,bhfv->bthv", reader, sums)
        denominator = denominator + torch.einsum("bthf,bhf->bth", reader, norms)
    return divide(numerator, denominator)
