"""Feature maps: q or k [B, T, H, K] -> features [B, T, H, F]; one file each, what several share in `shared`."""

from __future__ import annotations

import sys
from typing import ClassVar, NamedTuple

from torch import Tensor

from linearize.mixers.base import LayerShape, Part
from linearize.registry import Registry, discover


class Products(NamedTuple):
    """Of a map with phi(x).phi(y) = 1 + z + z^2 / 2 for z = scale x'.y': kernels need x' = `projected` and no feature.

    Attributes:
        dim: width of x'.
        scale: factor on x'.y'.
    """

    dim: int
    scale: float


class FeatureMap(Part):
    """Base of the feature maps.

    Attributes:
        feature_dim: F.
        state_heads: heads of the key features, so of the recurrent state: H, or N when query heads share them.
        non_negative: phi(q).phi(k) >= 0 for every q and k, so a running sum of the key features can normalize.
        uses_position: `query` and `key` need `position`; the others ignore it.
        products: see `Products`, or None for other maps.
        at_zero: what every feature of a key of zeros is, where most features of keys lie about it; 0.0 elsewhere, as
            with powers of e and shares of a sum, whose many small ones would be lost in a difference from it.
    """

    non_negative: ClassVar[bool] = True
    uses_position: ClassVar[bool] = False
    products: Products | None = None
    at_zero: float = 0.0
    feature_dim: int
    state_heads: int

    def __init__(self, config: Part.Config, shape: LayerShape) -> None:
        super().__init__()
        self.state_heads = shape.kv_heads

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        """q [B, T, H, K] -> [B, T, H, F]; position [B, T] int64, tokens since the start of the document."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered map defines it

    def key(self, k: Tensor, position: Tensor | None = None) -> Tensor:
        """k [B, T, N, K] -> [B, T, state_heads, F]; position as in `query`."""
        raise NotImplementedError(type(self))  # pragma: no cover

    def projected(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Where there are `products`: q, k as there -> [B, T, H, dim], [B, T, state_heads, dim], in their dtype."""
        raise NotImplementedError(type(self))  # pragma: no cover


FEATURE_MAPS: Registry[FeatureMap] = Registry("feature map")
discover(sys.modules[__name__])
