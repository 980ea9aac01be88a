"""The same in blocks of queries: O(T (C + W)) memory, no loop over blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.window.merge import merge
from linearize.kernels.window.reference import Weighted, softmax_scores, weigh
from linearize.kernels.window.seen import Seen


def _pad(x: Tensor, front: int, back: int) -> Tensor:
    """Zeros before and behind along dim 1."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (front, back)) if front or back else x


def window_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    *,
    scaling: float,
    softcap: float | None = None,
    chunk: int = 64,
) -> Weighted:
    """Softmax partial of every query over the keys that it sees.

    Args:
        q: [B, T, H, K].
        k, v: [B, P + T, N, K or V], P = `seen.prefix`.

    Returns:
        numerator [B, T, H, V], denominator [B, T, H], row maximum [B, T, H].
    """
    tokens, window = q.shape[1], seen.window
    chunk = min(chunk, tokens)
    extra = -tokens % chunk
    blocks, span = (tokens + extra) // chunk, window + chunk
    lead = window - seen.prefix
    cut = slice(max(0, -lead), None)
    q_blocks = _pad(q, 0, extra).unflatten(1, (blocks, chunk))
    # unfold puts the span last; block c sees keys [c chunk - lead, c chunk - lead + span)
    k_blocks, v_blocks = (
        _pad(x[:, cut], max(0, lead), extra).unfold(1, span, chunk).movedim(-1, 2) for x in (k, v)
    )
    first = seen.places(tokens, q.device)
    first_blocks = F.pad(first, (0, extra), value=seen.prefix + tokens).unflatten(1, (blocks, chunk))
    place = torch.arange(blocks, device=q.device)[:, None] * chunk + torch.arange(span, device=q.device)
    key = (place - lead)[:, None]
    own = (torch.arange(blocks * chunk, device=q.device) + seen.prefix).unflatten(0, (blocks, chunk))[
        ..., None
    ]
    visible = (key <= own) & (key >= 0) & (key >= first_blocks[..., None])
    scores = softmax_scores(q_blocks, k_blocks, scaling, softcap)
    numerator, denominator, top = (
        x.flatten(1, 2)[:, :tokens] for x in weigh(scores, visible[:, :, None], v_blocks)
    )
    if seen.pin is None:
        return numerator, denominator, top
    return merge((numerator, denominator, top), _pinned(q, k, v, seen, first, scaling, softcap))


def _pinned(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen, first: Tensor, scaling: float, softcap: float | None
) -> Weighted:
    """The softmax over the pinned keys that lie before each query's run."""
    assert seen.pin is not None
    own = torch.arange(seen.prefix, seen.prefix + q.shape[1], device=q.device)[:, None]
    order = torch.arange(seen.pins, device=q.device)
    wanted = (seen.pin.to(torch.int64)[..., None] + order).expand(q.shape[0], -1, -1)
    visible = (wanted <= own) & (wanted < first[..., None])
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
    index = wanted.clamp(max=k.shape[1] - 1)
    scores = softmax_scores(q[:, :, None], k[rows, index], scaling, softcap)
    made = weigh(scores, visible[:, :, None, None], v[rows, index])
    numerator, denominator, top = (x[:, :, 0] for x in made)
    return numerator, denominator, top
