"""A value per head and feature that follows the hidden state through a narrow bottleneck, for gates and rates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import fill, wide


class LowRank(nn.Module):
    """base + f(x W1) W2, f = tanh or nothing: hidden x [B, T, D] -> [B, T, M, F].

    W1 = 0 and W2 ~ U(-0.01, 0.01) at the start, as in RWKV-6 and in conversions to RWKV (RWKV-7's orthogonal W2 times
    0.1 is of the same size): every token begins at `base`, and the first gradient already reaches W1.

    Args:
        model_dim: D.
        rank: width between W1 [D, rank] and W2 [rank, M F].
        heads: M.
        features: F.
        tanh: whether f is tanh.
    """

    SPREAD = 0.01

    def __init__(self, model_dim: int, rank: int, heads: int, features: int, *, tanh: bool) -> None:
        super().__init__()
        self.tanh = tanh
        self.down = nn.Parameter(torch.empty(model_dim, rank))
        self.up = nn.Parameter(torch.empty(rank, heads, features))
        self.base = nn.Parameter(torch.empty(heads, features))

    def start(self, base: Tensor | float) -> None:
        """Put the parameters at their initial values; `base` is a number, or broadcasts to [M, F]."""
        fill(self.down, 0.0)
        nn.init.uniform_(self.up, -self.SPREAD, self.SPREAD)
        fill(self.base, base)

    def forward(self, hidden: Tensor) -> Tensor:
        narrow = hidden @ self.down.to(hidden.dtype)
        if self.tanh:
            narrow = narrow.tanh()
        added = wide(torch.einsum("btr,rmf->btmf", narrow, self.up.to(hidden.dtype)))
        return self.base.to(added.dtype) + added
