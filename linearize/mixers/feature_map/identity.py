"""The heads as they are: phi(q).phi(k) is the score itself (RetNet, GLA, DeltaNet and their kin)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from linearize.mixers.base import LayerShape, Part, wide
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import ParameterFree


@FEATURE_MAPS.register("identity")
class Identity(ParameterFree):
    """phi(x) = x, or x / |x|; queries times the teacher's scaling, 1/sqrt(K) in most models; F = K, no parameters.

    With `l2_normalize` keys lie on the unit sphere, which keeps the delta rule's state bounded (DeltaNet, Yang et al.
    2024, arXiv 2406.06484).

    Limitations: weights are signed, so a running sum of them may pass through zero and cannot normalize.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    non_negative = False

    @dataclass
    class Config(Part.Config):
        l2_normalize: bool = False
        """Queries and keys of length one."""
        scaled: bool = True
        """Queries times the teacher's scaling."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.l2_normalize = config.l2_normalize
        self.scaling = shape.scaling if config.scaled else 1.0

    def features(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-6) if self.l2_normalize else x

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        return self.features(wide(q)) * self.scaling
