"""Chunked linear attention in torch: dense inside a chunk, a float32 state between chunks; O(T) memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_chunk(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, docs: Tensor, state: tuple[Tensor, Tensor], *, chunk: int = 64
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Causal linear attention (query t sees keys s <= t of its own document) with a carried state.

    Keys that nobody may see (padding) must come with zero features.

    Args:
        phi_q: [B, T, H, F].
        phi_k: [B, T, M, F], M dividing H.
        v: [B, T, M, V].
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        state: sums [B, M, F, V] and normalizers [B, M, F] of everything before, float32 or wider.

    Returns:
        numerator [B, T, H, V], denominator [B, T, H], and the new state, which holds the last document only.
    """
    batch, tokens, heads, width = phi_q.shape
    state_heads = phi_k.shape[2]
    chunk = min(chunk, tokens)
    extra = -tokens % chunk
    blocks = (tokens + extra) // chunk
    if extra:
        phi_q, phi_k, v = (F.pad(x, (0, 0, 0, 0, 0, extra)) for x in (phi_q, phi_k, v))
        docs = torch.cat([docs, docs[:, -1:].expand(-1, extra)], dim=1)
    phi_q = phi_q.reshape(batch, blocks, chunk, state_heads, heads // state_heads, width)
    phi_k, v, docs = (x.unflatten(1, (blocks, chunk)) for x in (phi_k, v, docs))

    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).tril()
    visible = causal & (docs[:, :, :, None] == docs[:, :, None, :])
    weights = torch.einsum("bctmgf,bcsmf->bcmgts", phi_q, phi_k) * visible[:, :, None, None]
    numerator = torch.einsum("bcmgts,bcsmv->bctmgv", weights, v)
    denominator = weights.sum(-1).permute(0, 1, 4, 2, 3)

    # what a chunk adds for later chunks: only keys of the document that is still open at its end
    open_doc = docs[:, :, -1]
    phi_k = phi_k * (docs == open_doc[:, :, None])[..., None, None].to(phi_k.dtype)
    added, added_norm = torch.einsum("bcsmf,bcsmv->bcmfv", phi_k, v), phi_k.sum(2)
    before = torch.cat([torch.zeros_like(open_doc[:, :1]), open_doc[:, :-1]], dim=1)
    keep = (before == open_doc).to(added.dtype)
    entering, entering_norm = [state[0]], [state[1]]
    for block in range(blocks):
        kept = keep[:, block, None, None]
        entering.append(entering[-1] * kept[..., None] + added[:, block])
        entering_norm.append(entering_norm[-1] * kept + added_norm[:, block])
    sees_entering = (docs == before[:, :, None])[..., None, None].to(added.dtype)
    reader = phi_q * sees_entering[..., None]
    numerator = numerator + torch.einsum("bctmgf,bcmfv->bctmgv", reader, torch.stack(entering[:-1], 1))
    denominator = denominator + torch.einsum("bctmgf,bcmf->bctmg", reader, torch.stack(entering_norm[:-1], 1))
    shaped = numerator.reshape(batch, blocks * chunk, heads, -1)[:, :tokens]
    return shaped, denominator.reshape(batch, blocks * chunk, heads)[:, :tokens], (entering[-1], entering_norm[-1])
