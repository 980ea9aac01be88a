"""Second-order Taylor expansion of the exponential (Based, Arora et al. 2024, arXiv 2402.18668)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import PerHeadProjection
from linearize.mixers.options import number


@FEATURE_MAPS.register("taylor")
class Taylor(PerHeadProjection):
    """phi(x) = [1, x, pairs of x], so that phi(q).phi(k) = 1 + z + z^2 / 2 for z = q.k / sqrt(dim), after x W.

    F = 1 + dim + dim (dim + 1) / 2, since x_i x_j and x_j x_i are one feature with twice the weight: 153 for the
    published dim of 16, where the paper's code stores 273 for the same products. W [K, dim] per head starts as the
    first `dim` columns of the identity. With ``dim: 0`` there is no W and z is the teacher's own scaled score, but
    a head of 64 has 2,145 features.

    Limitations: the weight is never below 1/2, so far keys are not forgotten, and it rises again for z < -1. Single
    features are signed though all products are positive, so a state in float32 loses a few digits.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    @dataclass
    class Config(PerHeadProjection.Config):
        dim: int = number(16, least=0, most=256)
        """Columns of W, or 0: the whole head. Features grow with its square."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        width = config.dim or shape.key_dim
        self.scaling = config.dim**-0.5 if config.dim else shape.scaling
        self.feature_dim = 1 + width + width * (width + 1) // 2

    def activate(self, u: Tensor) -> Tensor:
        x = u * math.sqrt(self.scaling)
        first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        # (x.y)^2 / 2 = sum of x_i^2 y_i^2 / 2 over i, plus x_i x_j y_i y_j over pairs i < j
        weight = torch.where(first == second, x.new_full((), math.sqrt(0.5)), x.new_ones(()))
        return torch.cat([torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * weight], -1)
