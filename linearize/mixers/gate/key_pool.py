"""The gate from the key itself, with no new parameter (Liger, Lan et al. 2025, arXiv 2503.01496, table 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.base import LayerShape, Part, wide
from linearize.mixers.gate import GATES, Gate, log_sigmoid
from linearize.mixers.options import number


@GATES.register("key_pool")
class KeyPoolGate(Gate):
    """log decay = logsigmoid(pool(k)) / divisor, per key-value head and feature.

    pool averages neighboring key dims down to the feature dim; where the two are equal, as in Liger's GLA, it does
    nothing. Liger's code divides by 16 for GLA and GSA (the paper does not say so) and by 1 for HGRN2; the code is
    what gives the published numbers.
    """

    per_feature = True
    uses_hidden = False

    @dataclass
    class Config(Part.Config):
        divisor: float = number(16.0, above=0)
        """decay = sigmoid(pool(k)) ** (1 / divisor); 16: 0.958 at a key of zero."""

    def __init__(self, config: Config, shape: LayerShape, feature_dim: int) -> None:
        super().__init__(config, shape, feature_dim)
        self.divisor = config.divisor
        self.feature_dim = feature_dim

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        pooled = k
        if k.shape[-1] != self.feature_dim:
            pooled = F.adaptive_avg_pool1d(k.flatten(0, 1), self.feature_dim).unflatten(0, k.shape[:2])
        return log_sigmoid(wide(pooled), self.divisor)
