"""Softmax over the head dimension (Liger, Lan et al. 2025, arXiv 2503.01496)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.base import Part
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import FLOOR, ParameterFree


@FEATURE_MAPS.register("softmax_dim")
class SoftmaxDim(ParameterFree):
    """phi(x) = softmax of x over its K dimensions, so phi sums to one and 0 < phi(q).phi(k) < 1; F = K, no parameters.

    Features are at least 1e-12, where float32 would end in zeros. Liger takes it of raw q and k: no scaling, and no
    rotary positions in this branch.

    Limitations: a constant added to a head's dimensions does nothing, and a key's length only sharpens its features.
    """

    @dataclass
    class Config(Part.Config):
        pass

    def features(self, x: Tensor) -> Tensor:
        return x.softmax(-1).clamp_min(FLOOR)
