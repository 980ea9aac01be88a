"""The definition: a loop over tokens; float64 in, float64 out."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, docs: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T ; o_t = S_t^T q_t.

    The state forgets first, then the value that it holds under k_t is moved towards v_t by beta_t. Gated delta rule,
    one decay a head: Yang et al. 2025 (Gated DeltaNet), eq. 10, whose state is the transpose; Kimi delta attention, one
    a key dimension: Kimi Team 2025 (arXiv 2510.26692), eq. 1; without decay: Schlag et al. 2021, Yang et al. 2024
    (DeltaNet). The first token of a document meets an empty state. Tokens that nobody may see (padding) come with zero
    beta and zero log decay: they leave the state as it is.

    Args:
        q: [B, T, H, F].
        k: [B, T, M, F], M dividing H, of length one (beta in [0, 2] then keeps the state bounded).
        v: [B, T, M, V].
        beta: [B, T, M].
        log_decay: [B, T, M] or [B, T, M, F], finite, at most zero, or None for no forgetting.
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        state: [B, M, F, V], float32 or wider.

    Returns:
        o [B, T, H, V] and the new state, which holds the last document only.
    """
    decay = torch.ones_like(beta) if log_decay is None else log_decay.exp()
    grouped = q.unflatten(2, (k.shape[2], -1))
    outputs = []
    current = torch.zeros(docs.shape[0], dtype=docs.dtype, device=docs.device)
    for t in range(q.shape[1]):
        alive = (docs[:, t] == current).to(state.dtype)
        current = docs[:, t]
        kept = decay[:, t, :, None, None] if decay.dim() == 3 else decay[:, t, :, :, None]
        state = state * alive[:, None, None, None] * kept
        held = torch.einsum("bmf,bmfv->bmv", k[:, t], state)
        change = beta[:, t, :, None] * (v[:, t] - held)
        state = state + k[:, t, :, :, None] * change[:, :, None]
        outputs.append(torch.einsum("bmgf,bmfv->bmgv", grouped[:, t], state).flatten(1, 2))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1]), state
