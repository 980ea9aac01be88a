"""Exponential features, one to a head dimension (a baseline of Hedgehog's, Zhang et al. 2024, arXiv 2402.04347)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.base import LayerShape, Part, wide
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import ParameterFree, exponential
from linearize.mixers.options import choice_problems, number


@FEATURE_MAPS.register("exp")
class Exp(ParameterFree):
    """phi(x) = exp(t x), by default less the row maximum on queries; F = K, no parameters.

    A running-sum normalizer cancels the query's factor exp(-t max q), so there the shift is for float32's sake only.
    Without a normalizer each query's output shrinks by that factor, and under one shared with a window the
    recurrent branch weighs less by it. On keys (`both`) the shift changes the function everywhere: every key's
    largest feature becomes one, however long the key.

    Limitations: exponents are cut at +-60, beyond which a float32 sum would overflow, so keys with |t k| > 60 tie.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    @dataclass
    class Config(Part.Config):
        scale: float = number(1.0, above=0, most=1000)
        """t; 2 is spikier and nearer to softmax."""
        less_maximum: str = "query"
        """Where the row maximum is taken off: query, both (queries and keys), none."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(less_maximum=(self.less_maximum, ("query", "both", "none")))

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        return exponential(self.config.scale * wide(q), less_maximum=self.config.less_maximum != "none")

    def key(self, k: Tensor, position: Tensor | None = None) -> Tensor:
        return exponential(self.config.scale * wide(k), less_maximum=self.config.less_maximum == "both")
