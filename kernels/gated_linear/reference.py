"""The definition: a loop over tokens; float64 in, float64 out."""

from __future__ import annotations

import torch
from torch import Tensor

GatedState = tuple[Tensor, Tensor | None]
"""Sums [B, M, F, V] and normalizers [B, M, F] (None without a normalizer), float32 or wider."""

Gated = tuple[Tensor, Tensor | None, GatedState]
"""Numerator [B, T, H, V], denominator [B, T, H] (None without a normalizer), state after the last token."""


def gated_linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    docs: Tensor,
    state: GatedState,
    *,
    bonus: Tensor | None = None,
    read_before: bool = False,
    normalize: bool = True,
    decay_values: bool = False,
) -> Gated:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, n_t = diag(exp(log_decay_t)) n_{t-1} + k_t.

    Numerator S_t^T q_t and denominator n_t . q_t; with `read_before` those of S_{t-1} and n_{t-1}, with a `bonus` u
    those of S_{t-1} + diag(u) k_t v_t^T and n_{t-1} + diag(u) k_t (RWKV-5 and -6). RetNet, GLA (Yang et al. 2024),
    HGRN2, Mamba-2 and Lizard are this with their own log decays. The first token of a document meets an empty
    state. Tokens that nobody may see (padding) come with zero k and zero log decay: they leave the state as it is.

    Args:
        q: [B, T, H, F].
        k: [B, T, M, F], M dividing H.
        v: [B, T, M, V].
        log_decay: [B, T, M] (one for a head) or [B, T, M, F] (one for each key dimension), finite, at most zero.
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        state: sums [B, M, F, V] and normalizers [B, M, F] of everything before, float32 or wider.
        bonus: u [M, F]; implies `read_before`.
        read_before: read the state before the token's own decay and key.
        normalize: keep the running sum of keys; without it denominator and normalizers are None.
        decay_values: log_decay is [B, T, M, V] and decays the columns of the state: S_t = S_{t-1} diag(..) + k_t v_t^T
            (needs `normalize=False`).

    Returns:
        numerator [B, T, H, V], denominator [B, T, H] or None, and the new state, which holds the last document only.

    Raises:
        ValueError: `decay_values` together with `normalize`.
    """
    check_options(normalize=normalize, decay_values=decay_values)
    sums, norms = state
    if norms is None or not normalize:
        norms = torch.zeros_like(sums[..., 0])
    decay = (log_decay[..., None] if log_decay.dim() == 3 else log_decay).exp()
    grouped = q.unflatten(2, (k.shape[2], -1))
    numerators, denominators = [], []
    current = torch.zeros(docs.shape[0], dtype=docs.dtype, device=docs.device)
    for t in range(q.shape[1]):
        alive = (docs[:, t] == current)[:, None, None].to(sums.dtype)
        current = docs[:, t]
        sums, norms = sums * alive[..., None], norms * alive
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        if decay_values:
            next_sums, next_norms = sums * decay[:, t, :, None, :] + kv, norms
        else:
            next_sums, next_norms = sums * decay[:, t, :, :, None] + kv, norms * decay[:, t] + k[:, t]
        if bonus is not None:
            seen, seen_norms = sums + bonus[..., None] * kv, norms + bonus * k[:, t]
        elif read_before:
            seen, seen_norms = sums, norms
        else:
            seen, seen_norms = next_sums, next_norms
        numerators.append(torch.einsum("bmgf,bmfv->bmgv", grouped[:, t], seen).flatten(1, 2))
        denominators.append(torch.einsum("bmgf,bmf->bmg", grouped[:, t], seen_norms).flatten(1, 2))
        sums, norms = next_sums, next_norms
    numerator = torch.stack(numerators, 1) if numerators else q.new_zeros(*q.shape[:3], v.shape[-1])
    denominator = torch.stack(denominators, 1) if denominators else q.new_zeros(q.shape[:3])
    return (numerator, denominator, (sums, norms)) if normalize else (numerator, None, (sums, None))


def check_options(*, normalize: bool, decay_values: bool) -> None:
    """Refuse options that contradict each other."""
    if decay_values and normalize:
        raise ValueError(
            "decay_values=True lets every value dimension forget at its own rate, so one running sum of keys cannot "
            "normalize them all: pass normalize=False"
        )
