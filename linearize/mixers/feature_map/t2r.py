"""T2R's one-layer ReLU map (Kasai et al. 2021, arXiv 2103.13076), and LoLCATs' variant of it (arXiv 2410.10254)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers import fits
from linearize.mixers.base import LayerShape
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import FLOOR, PerHeadProjection
from linearize.mixers.options import choice_problems
from linearize.mixers.statistics import Statistics


@FEATURE_MAPS.register("t2r")
class T2R(PerHeadProjection):
    """phi(x) = max(x W + b, 0), at least 1e-12, with one W [K, dim] per head; F = dim.

    T2R has a bias per feature and one map for q and k (``tied: true``); the code behind LoLCATs' T2R rows has one
    scalar bias per head (``bias: head``) and two maps. W starts as the identity: columns past K, whose zeros a ReLU
    would never train, as the negated identity, and so on in turn. b starts at zero.

    Limitations: features that vanish for every token are dead. The T2R paper scales q by 1/sqrt(K) first, which a
    running-sum normalizer cancels at zero bias and which W can learn. SUPRA (arXiv 2405.06640) finds the running sum
    unstable with this map at a billion parameters (HellaSwag 40.6 against 57.0 with a group norm).

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    @dataclass
    class Config(PerHeadProjection.Config):
        bias: str = "feature"
        """b has a value per feature (T2R), per head (LoLCATs' code), or there is none."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return super().problems() + choice_problems(bias=(self.bias, ("feature", "head", "none")))

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape, bias={"feature": config.dim, "head": 1, "none": 0}[config.bias])
        self.feature_dim = config.dim

    def start(self, weight: Tensor) -> Tensor:
        width, dim = weight.shape[1:]
        eye = torch.eye(width, dtype=weight.dtype, device=weight.device)
        return torch.cat([eye, -eye] * -(-dim // (2 * width)), 1)[:, :dim]

    LEVELS = (-1.0, 0.0, 1.0)
    """Thresholds above the mean of the keys' projections, in standard deviations."""

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """The start's W, and prototypes of the keys, each with thresholds that let a part of the keys through.

        Only where W has a bias to hold them. A shared W has to serve queries too, which are scaled to the keys' size by
        nothing: a running sum or a norm cancels the size.
        """
        assert self.query_weight is not None
        if self.query_bias is None:
            return []
        dim, plain = self.query_weight.shape[2], self.start(self.query_weight)
        found: list[dict[str, Tensor]] = []
        for clustered in (False, True):
            maps = []
            for head in range(statistics.k.shape[1]):
                keys = statistics.k[:, head]
                made = fits.prototypes(keys, keys[statistics.opens].mean(0), dim) if clustered else plain.T
                maps.append((made / made.norm(dim=1, keepdim=True).clamp_min(1e-6)).T)
            shared = torch.stack(maps)
            keys = torch.einsum("nmk,mkf->nmf", statistics.k, shared)
            for level in self.LEVELS:
                bias = -(keys.mean(0) + level * keys.std(0))
                bias = bias if self.query_bias.shape[1] == dim else bias.mean(1, keepdim=True)
                values = {"query_weight": shared, "query_bias": bias}
                if self.key_weight is not None:
                    values |= {"key_weight": shared, "key_bias": bias}
                sizes = {name: len(parameter) for name, parameter in self.named_parameters()}
                found.append(
                    {
                        name: value.repeat_interleave(sizes[name] // len(value), 0)
                        for name, value in values.items()
                    }
                )
        return found

    def activate(self, u: Tensor) -> Tensor:
        return u.relu().clamp_min(FLOOR)
