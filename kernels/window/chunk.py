"""The same in blocks of queries: O(T (C + W)) memory, no loop over blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.window.reference import Weighted, softmax_scores, weigh


def _pad(x: Tensor, tokens: int) -> Tensor:
    """Append `tokens` zero positions along dim 1."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, tokens)) if tokens else x


def window_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    docs: Tensor,
    *,
    window: int,
    scaling: float,
    softcap: float | None = None,
    reach: Tensor | None = None,
    chunk: int = 64,
) -> Weighted:
    """Softmax partial over the last `window` tokens, the query's own included.

    Keys and values carry `window` earlier positions in front (a carried ring, or invalid zeros).

    Args:
        q: [B, T, H, K].
        k, v: [B, W + T, N, K or V].
        valid, docs: [B, W + T], key may be seen / document number; a query sees keys of its own document only.
        reach: [B, T] int64, tokens that each query sees, at most `window`, which is what all see without it.

    Returns:
        numerator [B, T, H, V], denominator [B, T, H], row maximum [B, T, H].
    """
    tokens = q.shape[1]
    chunk = min(chunk, tokens)
    extra = -tokens % chunk
    blocks = (tokens + extra) // chunk
    span = window + chunk
    q_blocks = _pad(q, extra).unflatten(1, (blocks, chunk))
    # unfold puts the span last; block c sees prefixed positions [c * chunk, c * chunk + window + chunk)
    k_blocks = _pad(k, extra).unfold(1, span, chunk).movedim(-1, 2)
    v_blocks = _pad(v, extra).unfold(1, span, chunk).movedim(-1, 2)
    valid_blocks = _pad(valid, extra).unfold(1, span, chunk)
    docs_blocks = _pad(docs, extra).unfold(1, span, chunk)
    offset = torch.arange(span, device=q.device) - window - torch.arange(chunk, device=q.device)[:, None]
    in_window = (offset <= 0) & (offset > -window)
    if reach is not None:
        in_window = in_window & (offset > -_pad(reach, extra).unflatten(1, (blocks, chunk))[..., None])
    same_doc = docs_blocks[:, :, None, :] == docs_blocks[:, :, window:, None]
    visible = in_window & same_doc & valid_blocks[:, :, None, :]
    scores = softmax_scores(q_blocks, k_blocks, scaling, softcap)
    numerator, denominator, top = (
        x.flatten(1, 2)[:, :tokens] for x in weigh(scores, visible[:, :, None], v_blocks)
    )
    return numerator, denominator, top
