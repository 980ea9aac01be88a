"""The definition: an ordinary softmax over the keys that are young enough; what trains goes through other operators."""

from __future__ import annotations

import torch
from torch import Tensor


def newest_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    newest: Tensor,
    seen: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """One query a row against the `seen` newest keys of a ring, in which slot `newest` was written last.

    The keys lie as transformers' caches hold them, heads before tokens: they are written there by other code.

    Args:
        q: [B, H, K].
        keys, values: [B, N, S, K or V]; query head h reads key head h // (H / N).
        newest: [B] whole numbers, 0 to S - 1.
        seen: [B] whole numbers, 1 to S.
        scaling: of the scores.
        softcap: c; scores become c tanh(score / c).

    Returns:
        [B, H, V] in the dtype of the values; sums are float32 (float64 for float64 inputs).
    """
    batch, heads, width = q.shape
    held, slots = keys.shape[1], keys.shape[2]
    age = (newest[:, None] - torch.arange(slots, device=q.device)) % slots
    grouped = q.view(batch, held, heads // held, width)
    scores = (grouped @ keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill((age >= seen[:, None])[:, None, None], -torch.inf)
    return (scores.softmax(-1).to(values.dtype) @ values).flatten(1, 2)
