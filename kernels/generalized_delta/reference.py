"""The definition: a loop over tokens; float64 in, float64 out."""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_delta_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, docs: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T ; o_t = S_t^T q_t.

    What the state holds under a_t, before it decays, is added under b_t. RWKV-7 (Peng et al. 2025), whose state is
    the transpose, has a = -kappa and b = kappa * rate, with kappa the removal key of length one and the in-context
    learning rate in [0, 1]. Kimi delta attention is a = exp(log_decay) * k, b = -beta k, with beta k for k. The first
    token of a document meets an empty state. Tokens that nobody may see (padding) come with zero k, zero b and zero
    log decay: they leave the state as it is.

    Args:
        q: [B, T, H, F].
        k, a, b: [B, T, M, F], M dividing H; the caller keeps diag(w) + b a^T from growing, as the forms above do.
        v: [B, T, M, V].
        log_decay: [B, T, M, F], finite, at most zero.
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        state: [B, M, F, V], float32 or wider.

    Returns:
        o [B, T, H, V] and the new state, which holds the last document only.
    """
    grouped, decay = q.unflatten(2, (k.shape[2], -1)), log_decay.exp()
    outputs = []
    current = torch.zeros(docs.shape[0], dtype=docs.dtype, device=docs.device)
    for t in range(q.shape[1]):
        state = state * (docs[:, t] == current)[:, None, None, None].to(state.dtype)
        current = docs[:, t]
        held = torch.einsum("bmf,bmfv->bmv", a[:, t], state)
        moved = b[:, t, :, :, None] * held[:, :, None] + k[:, t, :, :, None] * v[:, t, :, None]
        state = decay[:, t, :, :, None] * state + moved
        outputs.append(torch.einsum("bmgf,bmfv->bmgv", grouped[:, t], state).flatten(1, 2))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1]), state
