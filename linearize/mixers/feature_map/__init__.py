"""Feature maps: q or k [B, T, H, K] -> non-negative features [B, T, H, F]; one file each."""

from __future__ import annotations

import sys

from torch import Tensor

from linearize.mixers.base import LayerShape, Part
from linearize.registry import Registry, discover


class FeatureMap(Part):
    """Base of the feature maps.

    Attributes:
        feature_dim: F.
        state_heads: heads of the key features, so of the recurrent state: H, or N when query heads share them.
    """

    feature_dim: int
    state_heads: int

    def __init__(self, config: Part.Config, shape: LayerShape) -> None:
        super().__init__()
        self.state_heads = shape.kv_heads

    def query(self, q: Tensor) -> Tensor:
        """q [B, T, H, K] -> [B, T, H, F]."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered map defines it

    def key(self, k: Tensor) -> Tensor:
        """k [B, T, N, K] -> [B, T, state_heads, F]."""
        raise NotImplementedError(type(self))  # pragma: no cover


FEATURE_MAPS: Registry[FeatureMap] = Registry("feature map")
discover(sys.modules[__name__])
