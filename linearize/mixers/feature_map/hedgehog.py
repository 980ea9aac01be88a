"""Hedgehog's learned feature map (Zhang et al. 2024, arXiv 2402.04347, section 4).

In the form that LoLCATs uses (arXiv 2410.10254, app. A).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, fill, repeat_heads
from linearize.mixers.feature_map import FEATURE_MAPS, FeatureMap


@FEATURE_MAPS.register("hedgehog")
class Hedgehog(FeatureMap):
    """phi(x) = [act(x W), act(-x W)] with one W [K, dim] per head and no bias.

    The Hedgehog paper writes exp; the code that reproduces LoLCATs' published numbers takes a softmax over the
    feature axis, each half for itself, so that phi sums to 2 and phi(q).phi(k) lies in (0, 2]. W starts as the
    identity (its first `dim` columns).

    Limitations: with ``per: query_head`` every query head maps the keys itself, so the recurrent state is not
    shared inside a group of query heads; ``per: kv_head`` shares it, and the state shrinks by the group size.

    Args:
        config: see `Config`.
        shape: the layer's numbers.
    """

    @dataclass
    class Config(Part.Config):
        dim: int = 64
        """Columns of W; the feature dim is twice that, or that with space: half."""
        per: str = "query_head"
        """Key map per query_head (as published) or per kv_head."""
        activation: str = "softmax"
        """softmax over the features, or exp with the row maximum taken off."""
        space: str = "full"
        """full = both signs, half = the positive one only."""
        tied: bool = False
        """One W for queries and keys; needs per: query_head."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            rules = {
                "per": (self.per, ("query_head", "kv_head")),
                "activation": (self.activation, ("softmax", "exp")),
                "space": (self.space, ("full", "half")),
            }
            found = [
                f"{key}: '{value}' is not one of {', '.join(valid)}"
                for key, (value, valid) in rules.items()
                if value not in valid
            ]
            if self.dim < 1:
                found.append(f"dim: {self.dim} must be at least 1")
            if self.tied and self.per != "query_head":
                why = "since keys and queries would have different head counts"
                found.append(f"tied: true needs per: query_head, {why}")
            return found

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config, self.group = config, shape.group
        self.state_heads = shape.heads if config.per == "query_head" else shape.kv_heads
        self.feature_dim = config.dim * (2 if config.space == "full" else 1)
        self.query_weight = nn.Parameter(torch.empty(shape.heads, shape.key_dim, config.dim))
        if config.tied:
            self.register_parameter("key_weight", None)
        else:
            self.key_weight = nn.Parameter(torch.empty(self.state_heads, shape.key_dim, config.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            fill(weight, torch.eye(*weight.shape[1:], dtype=weight.dtype, device=weight.device))

    def query(self, q: Tensor) -> Tensor:
        """q [B, T, H, K] -> [B, T, H, F]."""
        return self._features(q, self.query_weight)

    def key(self, k: Tensor) -> Tensor:
        """k [B, T, N, K] -> [B, T, state_heads, F]."""
        weight = self.query_weight if self.key_weight is None else self.key_weight
        return self._features(repeat_heads(k, self.state_heads // k.shape[2]), weight)

    def _features(self, x: Tensor, weight: Tensor) -> Tensor:
        u = torch.einsum("bthk,hkf->bthf", x, weight.to(x.dtype))
        signs = (u, -u) if self.config.space == "full" else (u,)
        if self.config.activation == "softmax":
            parts = [s.softmax(-1) for s in signs]
        else:
            parts = [(s - s.amax(-1, keepdim=True)).exp() for s in signs]
        return torch.cat(parts, dim=-1).clamp_min(1e-12)
