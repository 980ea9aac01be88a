"""The definition: a loop over tokens with the features written out; float64 in, float64 out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linearize.kernels.gated_linear.reference import Gated, GatedState, gated_linear_reference


def taylor_features(x: Tensor, scale: float) -> Tensor:
    """phi with phi(x).phi(y) = 1 + z + z^2 / 2 for z = scale x.y (Arora et al. 2024, arXiv 2402.18668, section 4.1).

    x_i x_j and x_j x_i are one feature with twice the weight: 1, then sqrt(scale) x, then scale x_i x_j for i <= j row
    by row, those with i = j times sqrt(1/2). This is the order in which states hold them.

    Args:
        x: [..., D].

    Returns:
        [..., F], F = 1 + D + D (D + 1) / 2.
    """
    x = x * math.sqrt(scale)
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = torch.where(first == second, x.new_full((), math.sqrt(0.5)), x.new_ones(()))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * weight], -1)


def taylor_linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    docs: Tensor,
    valid: Tensor,
    state: GatedState,
    *,
    normalize: bool = True,
) -> Gated:
    """S_t = S_{t-1} + phi(k_t) v_t^T, n_t = n_{t-1} + phi(k_t), with phi as in `taylor_features`.

    Numerator S_t^T phi(q_t) and denominator n_t . phi(q_t): sums of 1 + z + z^2 / 2 over the keys up to the query. The
    first token of a document meets an empty state. A key of zeros has the weight 1, so padding is told by `valid`.

    Args:
        q: [B, T, H, D].
        k: [B, T, M, D], M dividing H.
        v: [B, T, N, V], N dividing M.
        scale: factor on q.k, above zero.
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        valid: [B, T] bool, false for keys that nobody may see.
        state: sums [B, M, F, V] and normalizers [B, M, F] of everything before, float32 or wider.
        normalize: keep the running sum of features; without it denominator and normalizers are None.

    Returns:
        numerator [B, T, H, V], denominator [B, T, H] or None, and the new state, which holds the last document only.
    """
    heads = k.shape[2]
    phi_k = taylor_features(k, scale) * valid[..., None, None].to(k.dtype)
    v = v.repeat_interleave(heads // v.shape[2], dim=2)
    decay = k.new_zeros(k.shape[:3])
    return gated_linear_reference(
        taylor_features(q, scale), phi_k, v, decay, docs, state, normalize=normalize
    )
