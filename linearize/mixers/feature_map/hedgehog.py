"""Hedgehog's learned feature map (Zhang et al. 2024, arXiv 2402.04347, section 4).

In the form that LoLCATs uses (arXiv 2410.10254, app. A).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers import fits
from linearize.mixers.base import LayerShape
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import FLOOR, PerHeadProjection, exponential
from linearize.mixers.options import choice_problems
from linearize.mixers.statistics import Statistics


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

    SHARPNESS = (1.0, 2.0, 4.0)
    """Of the keys' assignment to prototypes, in units of the teacher's scaling."""

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """Maps onto prototypes of the keys, and the identity at log-normal scales (see `fits`).

        With columns p_f of W, the prototypes times the teacher's scaling, phi(q) is the softmax attention of q over the
        prototypes, and phi(k) says which of them the key stands with, so phi(q).phi(k) approaches the attention itself.
        Prototypes of keys have one length, or the longest would draw all keys. A shared W is made of these.
        """
        assert self.query_weight is not None
        heads, _, dim = self.query_weight.shape
        group, found = heads // statistics.k.shape[1], []
        scaling = statistics.shape.scaling
        centers, unit = [], []
        for head in range(statistics.k.shape[1]):
            keys = statistics.k[:, head]
            made = fits.prototypes(keys, keys[statistics.opens].mean(0), dim)
            centers.append(made.T)
            lengths = made.norm(dim=1, keepdim=True).clamp_min(1e-6)
            unit.append((made / lengths * keys.norm(dim=1).mean()).T)
        for sharpness in self.SHARPNESS:
            assigned = sharpness * scaling * torch.stack(unit)
            if self.key_weight is None:
                found.append({"query_weight": assigned.repeat_interleave(group, 0)})
                continue
            found.append(
                {
                    "query_weight": scaling * torch.stack(centers).repeat_interleave(group, 0),
                    "key_weight": assigned.repeat_interleave(len(self.key_weight) // len(assigned), 0),
                }
            )
        if self.key_weight is not None and self.config.dim > 2:
            found.append(self._sink(statistics))
        if self.key_weight is not None:
            keys = statistics.k.repeat_interleave(group, 1)
            of_queries, of_keys = (
                x[:, None, None] for x in fits.log_normal(statistics.q[:, :heads], keys, scaling)
            )
            of_keys = of_keys[:: heads // len(self.key_weight)]
            eye = self.start(self.query_weight)
            found.append({"query_weight": of_queries.to(eye) * eye, "key_weight": of_keys.to(eye) * eye})
        return found

    APART, OFF, SILENT = 8.0, 8.0, 16.0
    """Logits: that tell a first key from others, that close a feature to queries, and that take their other half."""

    def _sink(self, statistics: Statistics) -> dict[str, Tensor]:
        """The branch as the keeper of a text's first token, for windows that pin none: all other keys go unheard.

        Keys say in features 0 and 1 whether they are a first one; queries look at feature 0 alone, with a logit that
        follows the teacher's log ratio between the first key's weight and the largest other one. Their second half
        points to feature 2, at which no key stands.
        """
        assert self.query_weight is not None and self.key_weight is not None
        heads = len(self.query_weight)
        opens = statistics.opens
        told = torch.where(opens, 1.0, -1.0)
        weight = torch.where(opens, 1 / opens.sum().clamp_min(1), 1 / (~opens).sum().clamp_min(1))
        of_keys, of_queries = torch.zeros_like(self.key_weight), torch.zeros_like(self.query_weight)
        for head in range(len(of_keys)):
            keys = statistics.k[:, head * statistics.k.shape[1] // len(of_keys)]
            of_keys[head, :, 0] = self.APART * fits.linear(keys, told, weight).to(of_keys)
            of_keys[head, :, 1] = -of_keys[head, :, 0]
        rest = (~opens).nonzero()[:, 0]
        q, ratios = statistics.q[rest], statistics.moments.sink[rest].clamp(-20, 20)
        for head in range(heads):
            queries, ratio = q[:, head], ratios[:, head]
            # the softmax over features is e^logit where that is small against their number
            wanted = ratio - ratio.quantile(0.9) + math.log(self.config.dim) - 2
            constant = fits.linear(queries, torch.ones_like(ratio)).to(of_queries)
            of_queries[head, :, 0] = fits.linear(queries, wanted).to(of_queries)
            of_queries[head, :, 1] = -self.OFF * constant
            of_queries[head, :, 2] = -self.SILENT * constant
        return {"query_weight": of_queries, "key_weight": of_keys}

    def activate(self, u: Tensor) -> Tensor:
        signs = (u, -u) if self.config.space == "full" else (u,)
        if self.config.activation == "softmax":
            parts = [s.softmax(-1) for s in signs]
        else:
            parts = [exponential(s, less_maximum=True) for s in signs]
        return torch.cat(parts, dim=-1).clamp_min(FLOOR)
