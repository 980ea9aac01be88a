"""fla's gated linear attention (Yang et al. 2023, arXiv 2312.06635), as its model `gla` builds it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.export.layouts import folding
from linearize.export.layouts.difference import Difference, absent, as_they_are, rotated, unlike
from linearize.export.layouts.layer import ForeignLayer, Given, Layer
from linearize.export.layouts.norm import head_norm, norm_differences, quotient, scales
from linearize.mixers.gate.fixed import FixedGate


class GLA(ForeignLayer):
    """S_t = diag(a_t) S_{t-1} + phi(k_t) v_t^T, o_t = RMSNorm(K^(-1/2) S_t^T phi(q_t)), phi = relu or nothing.

    a = sigmoid(x W1 W2 + b)^(1/16) per key-value head and key dim, W1 [D, 16]. Key-value heads are shared in groups.
    The model hands its own norms' epsilon to the layer's; where the conversion's is another one, the queries are scaled
    by the root of the quotient, which gives the same: y / sqrt(y^2 + e) = c y / sqrt((c y)^2 + c^2 e), and phi(c q) = c
    phi(q).

    Decays that do not follow the text are a bias alone: one that is large keeps everything, and another one gives each
    head its own, for which the key-value heads are written once for every query head.

    Equal but for the floor of 1e-12 that the conversion's relu has.
    """

    name = "GLA"
    model = "gla"
    RANK, DIVISOR = 16, 16.0
    OPEN = 120.0
    """A logit whose sigmoid is one in every dtype."""

    def differences(self, given: Given) -> Iterator[Difference]:
        mixer, gate = given.mixer, given.mixer["gate"]
        yield from absent(mixer, "window")
        yield from unlike(
            mixer, "short_conv", mixer["short_conv"]["name"] == "none", "none, or one with SiLU behind it"
        )
        fits = as_they_are(mixer) or mixer["feature_map"]["name"] == "relu"
        yield from unlike(mixer, "feature_map", fits, "relu or identity")
        low = gate["name"] == "low_rank" and gate["rank"] <= self.RANK and gate["divisor"] == self.DIVISOR
        theirs = f"low_rank (rank {self.RANK}, divisor {self.DIVISOR:.0f}), fixed, or none"
        yield from unlike(mixer, "gate", low or gate["name"] in ("fixed", "none"), theirs)
        additive = mixer["update"]["name"] == "additive" and not mixer["update"]["start"]
        yield from unlike(mixer, "update", additive, "additive")
        yield from norm_differences(mixer)
        yield from rotated(mixer, given.shape)

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        given, weights, parts = layer.given, layer.weights, layer.parts
        shape, norm = given.shape, head_norm(given.mixer)
        assert norm is not None, "a composition with differences was to be written"
        factor = math.sqrt(shape.key_dim) * math.sqrt(quotient(given.eps, norm.eps))
        if given.mixer["feature_map"]["name"] == "identity" and given.mixer["feature_map"]["scaled"]:
            factor *= shape.scaling
        times = self._heads(given) // shape.kv_heads
        return {
            "q_proj.weight": folding.rows(weights["q"], factor),
            "k_proj.weight": folding.shared(weights["k"], shape.kv_heads, times),
            "v_proj.weight": folding.shared(weights["v"], shape.kv_heads, times),
            **self._gate(layer),
            "g_norm.weight": torch.ones(shape.value_dim),
            "o_proj.weight": folding.columns(weights["o"], scales(norm, parts, shape.heads, shape.value_dim)),
        }

    def _heads(self, given: Given) -> int:
        """Heads with a decay of their own."""
        gate = given.mixer["gate"]
        own = gate["name"] == "fixed" and gate["per"] == "query_head"
        return given.shape.heads if own else given.shape.kv_heads

    def _gate(self, layer: Layer) -> dict[str, Tensor]:
        given, parts, rank = layer.given, layer.parts, self.RANK
        shape, name = given.shape, given.mixer["gate"]["name"]
        if name == "low_rank":
            down, up = parts["recurrent.gate.down"], parts["recurrent.gate.up"].flatten(1)
            return {
                "gk_proj.0.weight": F.pad(down, (0, rank - down.shape[1])).T,
                "gk_proj.1.weight": F.pad(up, (0, 0, 0, rank - len(up))).T,
                "gk_proj.1.bias": parts["recurrent.gate.bias"].flatten(),
            }
        bias = torch.full((self._heads(given),), self.OPEN, dtype=torch.float64)
        if name == "fixed":
            chosen = {key: value for key, value in given.mixer["gate"].items() if key != "name"}
            fixed = FixedGate(FixedGate.Config(**chosen), shape, shape.key_dim)
            if fixed.log_rate is not None:
                fixed.log_rate.data = parts["recurrent.gate.log_rate"].double()
            kept = self.DIVISOR * fixed(None, torch.zeros(1, 1, 1, 1, dtype=torch.float64))[0, 0].detach()
            bias = kept - (-kept.expm1()).log()  # the logit of exp(kept), also where that is next to zero
        return {
            "gk_proj.0.weight": torch.zeros(rank, shape.hidden_dim()),
            "gk_proj.1.weight": torch.zeros(len(bias) * shape.key_dim, rank),
            "gk_proj.1.bias": bias.repeat_interleave(shape.key_dim).float(),
        }

    def settings(self, given: Given) -> dict[str, Any]:
        shape, features = given.shape, given.mixer["feature_map"]["name"]
        return {
            "expand_k": shape.heads * shape.key_dim / shape.hidden_dim(),
            "expand_v": shape.heads * shape.value_dim / shape.hidden_dim(),
            "num_heads": shape.heads,
            "num_kv_heads": self._heads(given),
            "feature_map": None if features == "identity" else features,
            "use_short_conv": False,
            "use_output_gate": False,
            "elementwise_affine": True,
        }
