"""Chunked linear attention: dense inside a chunk, a float32 state between chunks; O(T) memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.chunks import at_least_float32

GROUP = 32
"""Chunks whose states are summed by one matrix product."""


def linear_chunk(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, docs: Tensor, state: tuple[Tensor, Tensor], *, chunk: int = 64
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Causal linear attention (query t sees keys s <= t of its own document) with a carried state.

    Keys that nobody may see (padding) must come with zero features. On CUDA it runs in Triton, as gated_linear without
    a decay: phi_q, phi_k and v of one dtype, numerators in that of v, denominators and states in float32.

    Args:
        phi_q: [B, T, H, F].
        phi_k: [B, T, M, F], M dividing H.
        v: [B, T, M, V].
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        state: sums [B, M, F, V] and normalizers [B, M, F] of everything before, float32 or wider.

    Returns:
        numerator [B, T, H, V], denominator [B, T, H], and the new state, which holds the last document only.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(phi_q, phi_k, v):
        from linearize.kernels.gated_linear.operator import gated_linear_triton

        numerator, denominator, (sums, norms) = gated_linear_triton(phi_q, phi_k, v, None, docs, state)
        assert denominator is not None and norms is not None
        return numerator, denominator, (sums, norms)
    dtype = v.dtype
    phi_q, phi_k, v = at_least_float32(phi_q, phi_k, v)
    numerator, denominator, state = torch_chunk(phi_q, phi_k, v, docs, state, chunk)
    return numerator.to(dtype), denominator, state


def torch_chunk(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, docs: Tensor, state: tuple[Tensor, Tensor], chunk: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`linear_chunk` in torch."""
    batch, tokens, heads, width = phi_q.shape
    state_heads = phi_k.shape[2]
    chunk = max(1, min(chunk, tokens))
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
    before = torch.cat([torch.zeros_like(open_doc[:, :1]), open_doc], dim=1)
    phi_k = phi_k * (docs == open_doc[:, :, None])[..., None, None].to(phi_k.dtype)
    added = torch.einsum("bcsmf,bcsmv->bcmfv", phi_k, v)
    entering, last = _carry(added, open_doc, before, state[0])
    entering_norm, last_norm = _carry(phi_k.sum(2), open_doc, before, state[1])
    reader = phi_q * (docs == before[:, :-1, None])[..., None, None, None].to(phi_q.dtype)
    numerator = numerator + torch.einsum("bctmgf,bcmfv->bctmgv", reader, entering)
    denominator = denominator + torch.einsum("bctmgf,bcmf->bctmg", reader, entering_norm)
    shaped = numerator.reshape(batch, blocks * chunk, heads, -1)[:, :tokens]
    return shaped, denominator.reshape(batch, blocks * chunk, heads)[:, :tokens], (last, last_norm)


def _carry(added: Tensor, open_doc: Tensor, before: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Sums that enter each chunk, and those that leave the last one.

    Document numbers never decrease, so a chunk's contribution is alive as long as the document that was open at its
    end still is: a 0/1 matrix says which, and one product per group of chunks sums them.

    Args:
        added: [B, C, ...] what each chunk adds.
        open_doc: [B, C] document at the end of each chunk.
        before: [B, C + 1] document at the start of each chunk, and at the end of all.
        state: [B, ...] of document 0.
    """
    entering = []
    for first in range(0, added.shape[1], GROUP):
        piece = added[:, first : first + GROUP]
        size = piece.shape[1]
        starts = before[:, first : first + size + 1]
        earlier = torch.ones(size + 1, size, dtype=torch.bool, device=added.device).tril(-1)
        alive = earlier & (starts[:, :, None] == open_doc[:, None, first : first + size])
        kept = (starts == starts[:, :1]).to(added.dtype)
        sums = torch.einsum("bce,be...->bc...", alive.to(added.dtype), piece)
        sums = sums + kept[(...,) + (None,) * (state.dim() - 1)] * state[:, None]
        entering.append(sums[:, :-1])
        state = sums[:, -1]
    return entering[0] if len(entering) == 1 else torch.cat(entering, 1), state
