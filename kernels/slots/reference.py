"""The definition: a loop over tokens; float64 in, float64 out."""

from __future__ import annotations

import torch
from torch import Tensor

SlotState = tuple[Tensor, Tensor]
"""Keys of the slots, transposed [B, M, K, S], and values of the slots [B, M, S, V], float32 or wider."""


def slots_reference(
    q: Tensor, k: Tensor, v: Tensor, writes: Tensor | None, log_decay: Tensor, docs: Tensor, state: SlotState
) -> tuple[Tensor, SlotState]:
    """K~_t = diag(a_t) K~_{t-1} + s_t k_t^T ; V~_t = diag(a_t) V~_{t-1} + s_t v_t^T ; o_t = V~_t^T softmax(K~_t q_t).

    Gated slot attention (Zhang et al. 2024), there with s = 1 - a. The scores are not scaled: scale q. The
    first token of a document meets empty slots. Tokens that nobody may see (padding) come with zero writes and zero
    log decay: they leave the slots as they are.

    Args:
        q: [B, T, H, K].
        k: [B, T, M, K], M dividing H.
        v: [B, T, M, V].
        writes: s [B, T, M, S], how much of the token each of S slots takes; None for 1 - exp(log_decay).
        log_decay: log a [B, T, M, S], finite, at most zero.
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        state: transposed keys [B, M, K, S] and values [B, M, S, V] of the slots, float32 or wider.

    Returns:
        o [B, T, H, V] and the new state, which holds the last document only.
    """
    keys, values = state[0].mT, state[1]
    writes = -log_decay.expm1() if writes is None else writes
    grouped, decay = q.unflatten(2, (k.shape[2], -1)), log_decay.exp()
    outputs = []
    current = torch.zeros(docs.shape[0], dtype=docs.dtype, device=docs.device)
    for t in range(q.shape[1]):
        kept = decay[:, t] * (docs[:, t] == current)[:, None, None].to(decay.dtype)
        current = docs[:, t]
        keys = kept[..., None] * keys + writes[:, t, :, :, None] * k[:, t, :, None]
        values = kept[..., None] * values + writes[:, t, :, :, None] * v[:, t, :, None]
        weights = torch.einsum("bmgk,bmsk->bmgs", grouped[:, t], keys).softmax(-1)
        outputs.append(torch.einsum("bmgs,bmsv->bmgv", weights, values).flatten(1, 2))
    out = torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1])
    return out, (keys.mT, values)
