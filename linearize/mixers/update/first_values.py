"""Values mixed with the first converted layer's (RWKV-7's value residual, Peng et al. 2025, arXiv 2503.14456)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape
from linearize.mixers.low_rank import LowRank


class FirstValues(nn.Module):
    """v + g (v_first - v), g = sigmoid(base + x W1 W2) for each key-value head and value dim.

    v_first are the first layer's values as its projection gives them, before any mixing. In the first layer itself both
    are one, and the weights do nothing. x is what the value projection reads: shifted where that is, whatever decays
    and rates read.

    Args:
        shape: the layer's numbers.
        rank: width between W1 [D, rank] and W2 [rank, N V].
        base: g's logit at the start.
    """

    def __init__(self, shape: LayerShape, rank: int, base: float) -> None:
        super().__init__()
        self.base = base
        self.share = LowRank(shape.hidden_dim(), rank, shape.kv_heads, shape.value_dim, tanh=False)

    def start(self) -> None:
        """Put the parameters at their initial values."""
        self.share.start(self.base)

    def forward(self, v: Tensor, first: Tensor, hidden: Tensor) -> Tensor:
        """Values [B, T, N, V], the first layer's [B, T, N, V] and the layer's input [B, T, D] -> [B, T, N, V]."""
        return torch.lerp(v, first.to(v.dtype), self.share(hidden).sigmoid().to(v.dtype))
