"""ReLU features (a baseline of Hedgehog's, Zhang et al. 2024, arXiv 2402.04347)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.base import Part
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import FLOOR, ParameterFree


@FEATURE_MAPS.register("relu")
class ReLU(ParameterFree):
    """phi(x) = max(x, 0), at least 1e-12; F = K, no parameters.

    Limitations: the negative half of the teacher's heads is lost, and weights are neither spiky nor monotone in q.k
    (Hedgehog: 39.5 on CoLA after conversion, softmax 58.8).
    """

    @dataclass
    class Config(Part.Config):
        pass

    def features(self, x: Tensor) -> Tensor:
        return x.relu().clamp_min(FLOOR)
