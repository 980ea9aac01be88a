"""Second-order Taylor expansion of the exponential (Based, Arora et al. 2024, arXiv 2402.18668)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.kernels.taylor_linear import taylor_features
from linearize.mixers.base import LayerShape
from linearize.mixers.feature_map import FEATURE_MAPS, Products
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
        self.products = Products(width, config.dim**-0.5 if config.dim else shape.scaling)
        self.feature_dim = 1 + width + width * (width + 1) // 2

    def activate(self, u: Tensor) -> Tensor:
        assert self.products is not None
        return taylor_features(u, self.products.scale)
