"""What several feature maps share: maps without parameters, a projection per head, exponentials that stay finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, fill, repeat_heads, wide
from linearize.mixers.feature_map import FeatureMap
from linearize.mixers.options import WIDEST, choice_problems, number

FLOOR = 1e-12
"""Least feature of maps that can reach zero: a query whose features all vanish still has weights to normalize."""

EXPONENT = 60.0
"""Largest size of an exponent: float32 ends at exp(88), and products and sums of features need the rest."""


def exponential(x: Tensor, *, less_maximum: bool) -> Tensor:
    """exp over the last axis, with exponents kept within +-EXPONENT.

    Args:
        x: [..., F].
        less_maximum: take each row's maximum off first. On queries this changes nothing that is normalized by its
            own sum; on keys it changes the function, since each key loses another factor.
    """
    if less_maximum:
        x = x - x.amax(-1, keepdim=True)
    return x.clamp(-EXPONENT, EXPONENT).exp()


class ParameterFree(FeatureMap):
    """Base of maps that treat every head alike: key features, and so the state, stay shared inside a group (M = N)."""

    def __init__(self, config: Part.Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.feature_dim = shape.key_dim

    def features(self, x: Tensor) -> Tensor:
        """phi of queries and keys alike, [B, T, *, K] -> [B, T, *, F]."""
        raise NotImplementedError(type(self))  # pragma: no cover - a map defines it, or query and key

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        return self.features(wide(q))

    def key(self, k: Tensor, position: Tensor | None = None) -> Tensor:
        return self.features(wide(k))


class PerHeadProjection(FeatureMap):
    """Base of learned maps: phi(x) = `activate`(x W + b) with a matrix [K, dim] for each head, b only where asked for.

    With ``per: query_head`` every query head maps the keys itself (as published for Hedgehog, T2R and LoLCATs), so
    the recurrent state is not shared inside a group of query heads; ``per: kv_head`` shares it, and the state shrinks
    by the group size. W starts as the first `dim` columns of the identity, b at zero. A class that allows ``dim: 0``
    has no W there, and all heads share the key features.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
        bias: values of b per head, 0 for none.
    """

    @dataclass
    class Config(Part.Config):
        dim: int = number(64, least=1, most=WIDEST)
        """Columns of W."""
        per: str = "query_head"
        """Key map per query_head (as published) or per kv_head."""
        tied: bool = False
        """One W for queries and keys; needs per: query_head."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            found = choice_problems(per=(self.per, ("query_head", "kv_head")))
            if self.tied and self.per != "query_head":
                why = "since keys and queries would have different head counts"
                found.append(f"tied: true needs per: query_head, {why}")
            return found

    query_weight: Tensor | None
    key_weight: Tensor | None
    query_bias: Tensor | None
    key_bias: Tensor | None

    def __init__(self, config: Config, shape: LayerShape, bias: int = 0) -> None:
        super().__init__(config, shape)
        self.tied = config.tied
        if config.per == "query_head" and config.dim:
            self.state_heads = shape.heads
        for side, heads, made in (("query", shape.heads, True), ("key", self.state_heads, not config.tied)):
            for name, size in (("weight", (shape.key_dim, config.dim)), ("bias", (bias,))):
                there = made and 0 not in size
                value = nn.Parameter(torch.empty(heads, *size)) if there else None
                self.register_parameter(f"{side}_{name}", value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.query_weight, self.key_weight):
            if weight is not None:
                fill(weight, self.start(weight))
        for bias in (self.query_bias, self.key_bias):
            if bias is not None:
                fill(bias, 0.0)

    def start(self, weight: Tensor) -> Tensor:
        """Initial W [K, dim] of every head."""
        return torch.eye(*weight.shape[1:], dtype=weight.dtype, device=weight.device)

    def query(self, q: Tensor, position: Tensor | None = None) -> Tensor:
        return self.activate(wide(self._project(q, self.query_weight, self.query_bias)))

    def key(self, k: Tensor, position: Tensor | None = None) -> Tensor:
        return self.activate(wide(self._projected_key(k)))

    def projected(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._project(q, self.query_weight, self.query_bias), self._projected_key(k)

    def _projected_key(self, k: Tensor) -> Tensor:
        k = repeat_heads(k, self.state_heads // k.shape[2])
        weight, bias = (self.query_weight, self.query_bias) if self.tied else (self.key_weight, self.key_bias)
        return self._project(k, weight, bias)

    def activate(self, u: Tensor) -> Tensor:
        """Projections [B, T, *, dim] -> features [B, T, *, F]."""
        raise NotImplementedError(type(self))  # pragma: no cover - every learned map defines it

    @staticmethod
    def _project(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        u = x if weight is None else torch.einsum("bthk,hkf->bthf", x, weight.to(x.dtype))
        if bias is None:
            return u
        u = wide(u)
        return u + bias.to(u.dtype)
