"""Weights of their own for stretches of the past, over the delta or the additive rule: the definition, quadratic."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.gated_delta import delta_reference
from linearize.kernels.gated_linear import gated_linear_reference


def level_of(apart: Tensor, most: int) -> Tensor:
    """On which level a key lies whose block differs from the query's in the bits of `apart`: their number, at most
    `most`."""
    return sum(((apart >> bit) > 0).to(torch.int64) for bit in range(most))  # type: ignore[return-value]


def stretches_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    shares: Tensor,
    place: Tensor,
    docs: Tensor,
    *,
    block: int,
) -> Tensor:
    """o_t = sum_s shares[t, level(t, s)] w_ts v_s, with w the weights of the rule, of a text that begins here.

    Guo et al. 2025 (arXiv 2506.04761), eq. 4 and 8. With b_t = place_t // block, level(t, s) is the number of binary
    digits of b_t xor b_s, at most L + 1.

    Args:
        q: [B, T, H, K] queries.
        k: [B, T, M, K] keys; M divides H. Keys that nobody may see are zero.
        v: [B, T, M, V] values.
        beta: [B, T, M] strengths of the delta rule; None is the additive rule.
        log_decay: [B, T, M] or [B, T, M, K], at most zero; None for none.
        shares: [B, T, H, L + 2].
        place: [B, T] how many tokens of the own document came before.
        docs: [B, T] document numbers, non-decreasing.
        block: tokens in a block, a power of two.

    Returns:
        o [B, T, H, V].
    """
    batch, tokens, heads = k.shape[:3]
    if log_decay is None:
        log_decay = k.new_zeros(k.shape[:3])
    eye = torch.eye(tokens, dtype=q.dtype, device=q.device)[None, :, None].expand(batch, -1, heads, -1)
    empty = k.new_zeros(batch, heads, k.shape[3], tokens)
    if beta is None:
        rule, _, _ = gated_linear_reference(q, k, eye, log_decay, docs, (empty, None), normalize=False)
    else:
        rule, _ = delta_reference(q, k, eye, beta, log_decay, docs, empty)
    own = place.clamp_min(0) // block
    level = level_of(own[:, :, None] ^ own[:, None], shares.shape[-1] - 1)
    weights = rule * shares.gather(3, level[:, :, None].expand(-1, -1, shares.shape[2], -1))
    return torch.einsum("bths,bshv->bthv", weights, v.repeat_interleave(q.shape[2] // heads, 2))
