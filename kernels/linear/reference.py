"""The definition: dense feature products under a visibility mask. Quadratic; float64 in, float64 out."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_reference(
    phi_q: Tensor, phi_k: Tensor, v: Tensor | None, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Linear-attention partial of every query over the keys that `visible` grants it.

    Args:
        phi_q: [B, T, H, F].
        phi_k: [B, S, M, F], M dividing H.
        v: [B, S, M, V], or None for the weights themselves in the numerator's place.
        visible: [B, T, S] bool.

    Returns:
        numerator [B, T, H, V] ([B, T, H, S] without v), denominator [B, T, H].
    """
    batch, tokens, heads, width = phi_q.shape
    state_heads = phi_k.shape[2]
    grouped = phi_q.reshape(batch, tokens, state_heads, heads // state_heads, width)
    weights = torch.einsum("btmgf,bsmf->bmgts", grouped, phi_k) * visible[:, None, None]
    denominator = weights.sum(-1).permute(0, 3, 1, 2).flatten(2, 3)
    if v is None:
        return weights.permute(0, 3, 1, 2, 4).flatten(2, 3), denominator
    return torch.einsum("bmgts,bsmv->btmgv", weights, v).flatten(2, 3), denominator
