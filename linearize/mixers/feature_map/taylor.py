"""Second-order Taylor expansion of the exponential (Based, Arora et al. 2024, arXiv 2402.18668)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from linearize.kernels.taylor_linear import taylor_features
from linearize.mixers import pairs
from linearize.mixers.base import LayerShape
from linearize.mixers.feature_map import FEATURE_MAPS, Products
from linearize.mixers.feature_map.shared import PerHeadProjection
from linearize.mixers.options import number
from linearize.mixers.statistics import Statistics


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

    SIZES = (1.0, 8.0, 64.0)
    """Sum of z^2 / 2 over the number of keys, where z follows the root of the teacher's weights."""

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """Projections whose z comes nearest the root of the teacher's weights, or its scores (see `pairs`).

        1 + z + z^2 / 2 follows exp(z) for small z alone, and a softmax's peaks are out of its reach. Where z is large
        it is a square, so z nearest sqrt(2 c p) makes weights near c p, each query's own c being divided away by a
        running sum; that nearness is Hellinger's distance of two distributions. The larger c, the less the floor of
        1/2 counts. Scores, as they are or less their mean over a query's keys, suit heads that look at all keys alike.
        """
        if self.query_weight is None:
            return []
        assert self.products is not None
        moments, found = pairs.seen(statistics), []
        for wanted, sizes in (
            (moments.scores, (1.0,)),
            (moments.centered, (1.0,)),
            (moments.roots, tuple(size**0.5 for size in self.SIZES)),
        ):
            found += [self._projections(moments, wanted * (size / self.products.scale)) for size in sizes]
        return found

    def _projections(self, moments: pairs.Seen, wanted: Tensor) -> dict[str, Tensor]:
        assert self.query_weight is not None
        dim = self.query_weight.shape[2]
        if self.key_weight is None:
            made = {"query_weight": pairs.tied(moments, wanted, dim)}
        else:
            both = pairs.products(moments, wanted, dim, len(self.key_weight))
            made = dict(zip(("query_weight", "key_weight"), both, strict=True))
        # more dims than the head has say nothing more
        return {name: pad(x, (0, dim - x.shape[2])).to(self.query_weight) for name, x in made.items()}

    def activate(self, u: Tensor) -> Tensor:
        assert self.products is not None
        return taylor_features(u, self.products.scale)
