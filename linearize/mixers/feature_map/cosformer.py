"""cosFormer: ReLU features re-weighted by distance (Qin et al. 2022, arXiv 2202.08791)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.mixers.base import LayerShape, Part, wide
from linearize.mixers.feature_map import FEATURE_MAPS, FeatureMap
from linearize.mixers.feature_map.shared import FLOOR
from linearize.mixers.options import number


@FEATURE_MAPS.register("cosformer")
class CosFormer(FeatureMap):
    """phi(x, p) = [relu(x) cos a, relu(x) sin a], a = pi p / (2 M), for the token at position p of its document.

    So phi(q, i).phi(k, j) = relu(q).relu(k) cos(pi (i - j) / (2 M)): near keys weigh more, by a kernel that is still
    a product of features. F = 2 K, and the state is shared inside a group of query heads.

    Limitations: the paper sets M to the text's length. M is fixed here (`length`), for a recurrent form cannot know
    how long the text will become, and positions past M count as M: weights stay non-negative, but two tokens that
    both come after M are no longer told apart by their distance.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    uses_position = True

    @dataclass
    class Config(Part.Config):
        length: int = number(4096, least=1, most=10_000_000)
        """M in tokens: the longest text that the re-weighting tells apart."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.length = config.length
        self.feature_dim = 2 * shape.key_dim

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        return self._features(q, position)

    def key(self, k: Tensor, position: Tensor | None = None) -> Tensor:
        return self._features(k, position)

    def _features(self, x: Tensor, position: Tensor | None) -> Tensor:
        if position is None:
            raise LinearizeError("cosformer weighs by distance: its query and key need position [B, T]")
        x = wide(x)
        angle = position.clamp(0, self.length).to(x.dtype) * (math.pi / 2 / self.length)
        angle = angle[..., None, None]
        x = x.relu().clamp_min(FLOOR)
        # the nearest float32 to pi / 2 lies above it
        return torch.cat([x * angle.cos().clamp_min(0.0), x * angle.sin()], -1)
