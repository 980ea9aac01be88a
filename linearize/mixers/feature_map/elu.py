"""1 + ELU, the first feature map of linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import Part
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import ParameterFree


@FEATURE_MAPS.register("elu")
class ELU(ParameterFree):
    """phi(x) = x + 1 for x > 0, exp(x) otherwise; F = K, no parameters.

    Limitations: weights are nearly flat, so converted models do poorly (Hedgehog, arXiv 2402.04347: 28.1 on CoLA,
    softmax 58.8).
    """

    at_zero = 1.0

    @dataclass
    class Config(Part.Config):
        pass

    def features(self, x: Tensor) -> Tensor:
        # 1 + elu(x) itself rounds to zero below -17 in float32
        return torch.where(x > 0, x + 1, x.clamp_max(0.0).exp())
