"""One token of linear attention: read the state."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_read(phi_q: Tensor, sums: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """What one query takes from the state.

    Args:
        phi_q: [B, H, F], H a multiple of M.

    Returns:
        numerator [B, H, V], denominator [B, H].
    """
    grouped = phi_q.unflatten(1, (sums.shape[1], -1))
    numerator = torch.einsum("bmgf,bmfv->bmgv", grouped, sums)
    return numerator.flatten(1, 2), torch.einsum("bmgf,bmf->bmg", grouped, norms).flatten(1, 2)
