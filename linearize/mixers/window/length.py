"""Scores that grow with the logarithm of the text's length, so that a softmax over more keys stays as sharp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linearize.kernels.window import Seen


def log_scaled(q: Tensor, count: Tensor, base: float) -> Tensor:
    """Queries times log(n - 1 + base) / log(base), one for the first token and growing from there.

    HALO scales the logits of its softmax layers without rotary positions so (Chen et al. 2026, arXiv 2601.22156; their
    code has a base of 362).

    Args:
        q: [B, T, H, K].
        count: [B, T] or [1, T], n, the keys that each query sees, its own among them.
        base: above 1; 0 leaves the queries as they are.
    """
    if not base:
        return q
    length = count.clamp_min(1).to(torch.promote_types(q.dtype, torch.float32)) - 1
    factor = torch.log(length + base) / math.log(base)
    return q * factor[..., None, None].to(q.dtype)


def seen_count(seen: Seen, tokens: int, device: torch.device) -> Tensor:
    """Keys [B, T], or [1, T], that each of so many queries sees; pinned ones left out."""
    return seen.prefix + 1 + torch.arange(tokens, device=device) - seen.places(tokens, device)
