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
    """The queries of a row's last T tokens, each against the `seen` newest keys that there were at its turn.

    The keys lie in a ring, as transformers' caches hold them, heads before tokens: they are written there by other
    code, those of all T tokens before the first query reads.

    Args:
        q: [B, T, H, K].
        keys, values: [B, N, S, K or V]; query head h reads key head h // (H / N).
        newest: [B, T] whole numbers, 0 to S - 1: the tokens' own slots, one behind the other.
        seen: [B, T] whole numbers, 1 to S - T + 1.
        scaling: of the scores.
        softcap: c; scores become c tanh(score / c).

    Returns:
        [B, T, H, V] in the dtype of the values; sums are float32 (float64 for float64 inputs).
    """
    batch, tokens, heads, width = q.shape
    held, slots = keys.shape[1], keys.shape[2]
    age = (newest[..., None] - torch.arange(slots, device=q.device)) % slots
    grouped = q.view(batch, tokens, held, heads // held, width).permute(0, 2, 3, 1, 4)
    scores = grouped.flatten(2, 3) @ keys.transpose(-1, -2)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    hidden = (age >= seen[..., None])[:, None, None]
    scores = scores.unflatten(2, (heads // held, tokens)).masked_fill(hidden, -torch.inf).flatten(2, 3)
    found = scores.softmax(-1).to(values.dtype) @ values
    return found.unflatten(2, (heads // held, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)
