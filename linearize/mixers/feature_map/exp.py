"""Exponential features, one to a head dimension (a baseline of Hedgehog's, Zhang et al. 2024, arXiv 2402.04347)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers import fits
from linearize.mixers.base import LayerShape, Part, accumulator, fill, wide
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import ParameterFree, exponential
from linearize.mixers.options import choice_problems, number
from linearize.mixers.statistics import Statistics


@FEATURE_MAPS.register("exp")
class Exp(ParameterFree):
    """phi(x) = exp(t x), by default less the row maximum on queries; F = K, no parameters unless t is `learned`.

    A running-sum normalizer cancels the query's factor exp(-t max q), so there the shift is for float32's sake only.
    Without a normalizer each query's output shrinks by that factor, and under one shared with a window the
    recurrent branch weighs less by it. On keys (`both`) the shift changes the function everywhere: every key's
    largest feature becomes one, however long the key.

    Limitations: exponents are cut at +-60, beyond which a float32 sum would overflow, so keys with |t k| > 60 tie.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    query_scale: nn.Parameter | None
    key_scale: nn.Parameter | None

    @dataclass
    class Config(Part.Config):
        scale: float = number(1.0, above=0, most=1000)
        """t; 2 is spikier and nearer to softmax."""
        learned: bool = False
        """t is a parameter of each query head and of each key-value head, which a calibration sets and stages train."""
        less_maximum: str = "query"
        """Where the row maximum is taken off: query, both (queries and keys), none."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(less_maximum=(self.less_maximum, ("query", "both", "none")))

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config
        for name, heads in (("query_scale", shape.heads), ("key_scale", shape.kv_heads)):
            self.register_parameter(name, nn.Parameter(torch.empty(heads, 1)) if config.learned else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for scale in (self.query_scale, self.key_scale):
            if scale is not None:
                fill(scale, self.config.scale)

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """Scales by the spread of queries and keys (see `fits.log_normal`), a key's the mean over its query heads."""
        if self.query_scale is None or self.key_scale is None:
            return []
        heads, shared = len(self.query_scale), len(self.key_scale)
        of_heads = torch.arange(heads, device=statistics.k.device) * shared // heads
        made = fits.log_normal(statistics.q[:, :heads], statistics.k[:, of_heads], statistics.shape.scaling)
        of_queries, of_keys = (x.to(self.query_scale)[:, None] for x in made)
        of_keys = of_keys.view(shared, -1).mean(1, keepdim=True)
        return [{"query_scale": of_queries, "key_scale": of_keys}]

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        scaled = wide(q) * self._scale(self.query_scale, q)
        return exponential(scaled, less_maximum=self.config.less_maximum != "none")

    def key(self, k: Tensor, position: Tensor | None = None) -> Tensor:
        scaled = wide(k) * self._scale(self.key_scale, k)
        return exponential(scaled, less_maximum=self.config.less_maximum == "both")

    def _scale(self, learned: Tensor | None, like: Tensor) -> Tensor | float:
        return self.config.scale if learned is None else learned.to(accumulator(like.dtype))
