"""RWKV-6's rule (Peng et al. 2024, arXiv 2404.05892), and RADLADS' balanced form of it (arXiv 2505.03005)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, fill
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.additive import Additive


@UPDATES.register("rwkv6")
class RWKV6(Additive):
    """S_t = diag(w_t) S_{t-1} + ((1 - w_t) * k_t) v_t^T, o_t = S_t^T q_t: RADLADS' balanced state.

    The factor 1 - w on the key makes S an average of the past instead of a sum, which bounds the output without a norm
    behind it. ``balanced: false, bonus: true`` is RWKV-6 itself, o_t = (S_{t-1} + diag(u) k_t
    v_t^T)^T q_t; ``balanced: false`` alone is `additive`, GLA's rule.

    Limitations: channels that remember long start to answer late, since each token adds only 1 - w of itself. RWKV-6
    starts u around zero, which hides a token from itself; here u starts at one.
    """

    decays: ClassVar[tuple[str, ...]] = ("head", "feature")
    dense = False
    takes_products = False

    @dataclass
    class Config(Additive.Config):
        balanced: bool = True
        """Keys times 1 - w."""
        bonus: bool = False
        """Read before the token's own decay and key, and see the own key times a learned u [M, F]."""

    bonus_weight: Tensor | None

    def make(self, shape: LayerShape) -> None:
        super().make(shape)
        self.balanced = self.config.balanced
        weight = nn.Parameter(torch.empty(self.heads, self.feature_dim)) if self.config.bonus else None
        self.register_parameter("bonus_weight", weight)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bonus_weight is not None:
            fill(self.bonus_weight, 1.0)

    def keys(self, stream: Stream) -> Tensor:
        if not self.balanced:
            return stream.k
        assert stream.log_decay is not None
        written = -stream.log_decay.expm1()
        return stream.k * (written if written.dim() == 4 else written[..., None])

    def bonus(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bonus_weight is None else self.bonus_weight.to(dtype)
