"""Hedgehog's learned feature map (Zhang et al. 2024, arXiv 2402.04347, section 4).

In the form that LoLCATs uses (arXiv 2410.10254, app. A).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import FLOOR, PerHeadProjection, exponential
from linearize.mixers.options import choice_problems


@FEATURE_MAPS.register("hedgehog")
class Hedgehog(PerHeadProjection):
    """phi(x) = [act(x W), act(-x W)] with one W [K, dim] per head and no bias.

    The Hedgehog paper writes exp; the code that reproduces LoLCATs' published numbers takes a softmax over the
    feature axis, each half for itself, so that phi sums to 2 and phi(q).phi(k) lies in (0, 2]. W starts as the
    identity (its first `dim` columns). F = 2 dim, or dim with ``space: half``.

    Limitations: with ``per: query_head`` every query head maps the keys itself, so the recurrent state is not
    shared inside a group of query heads; ``per: kv_head`` shares it, and the state shrinks by the group size.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    @dataclass
    class Config(PerHeadProjection.Config):
        activation: str = "softmax"
        """softmax over the features, or exp with the row maximum taken off."""
        space: str = "full"
        """full = both signs, half = the positive one only."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return super().problems() + choice_problems(
                activation=(self.activation, ("softmax", "exp")), space=(self.space, ("full", "half"))
            )

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.feature_dim = config.dim * (2 if config.space == "full" else 1)

    def activate(self, u: Tensor) -> Tensor:
        signs = (u, -u) if self.config.space == "full" else (u,)
        if self.config.activation == "softmax":
            parts = [s.softmax(-1) for s in signs]
        else:
            parts = [exponential(s, less_maximum=True) for s in signs]
        return torch.cat(parts, dim=-1).clamp_min(FLOOR)
