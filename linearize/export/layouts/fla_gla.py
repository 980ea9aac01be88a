"""fla's gated linear attention (Yang et al. 2023, arXiv 2312.06635), as its model `gla` builds it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from linearize.export.layouts import folding
from linearize.export.layouts.difference import Difference, absent, rotated, unlike
from linearize.export.layouts.layer import ForeignLayer, Given, Layer
from linearize.export.layouts.norm import head_norm, norm_differences, scales


class GLA(ForeignLayer):
    """S_t = diag(a_t) S_{t-1} + phi(k_t) v_t^T, o_t = RMSNorm(K^(-1/2) S_t^T phi(q_t)), phi = relu or nothing.

    a = sigmoid(x W1 W2 + b)^(1/16) per key-value head and key dim, W1 [D, 16]. Key-value heads are shared in groups.
    The model hands its own norms' epsilon to the layer's; where the conversion's is another one, the queries are scaled
    by the root of the quotient, which gives the same: y / sqrt(y^2 + e) = c y / sqrt((c y)^2 + c^2 e), and phi(c q) = c
    phi(q).

    Equal but for the floor of 1e-12 that the conversion's relu has.
    """

    name = "GLA"
    model = "gla"
    RANK, DIVISOR = 16, 16.0

    def differences(self, given: Given) -> Iterator[Difference]:
        mixer, gate = given.mixer, given.mixer["gate"]
        yield from absent(mixer, "window")
        yield from unlike(
            mixer, "short_conv", mixer["short_conv"]["name"] == "none", "none, or one with SiLU behind it"
        )
        plain = mixer["feature_map"]["name"] == "identity" and not mixer["feature_map"]["l2_normalize"]
        yield from unlike(
            mixer, "feature_map", plain or mixer["feature_map"]["name"] == "relu", "relu or identity"
        )
        low = gate["name"] == "low_rank" and gate["rank"] <= self.RANK and gate["divisor"] == self.DIVISOR
        yield from unlike(mixer, "gate", low, f"low_rank (rank {self.RANK}, divisor {self.DIVISOR:.0f})")
        additive = mixer["update"]["name"] == "additive" and not mixer["update"]["start"]
        yield from unlike(mixer, "update", additive, "additive")
        yield from norm_differences(mixer)
        yield from rotated(mixer, given.shape)

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        given, weights, parts = layer.given, layer.weights, layer.parts
        shape, norm = given.shape, head_norm(given.mixer)
        assert norm is not None, "a composition with differences was to be written"
        factor = math.sqrt(shape.key_dim) * math.sqrt(given.eps / norm.eps)
        if given.mixer["feature_map"]["name"] == "identity" and given.mixer["feature_map"]["scaled"]:
            factor *= shape.scaling
        down, up = parts["recurrent.gate.down"], parts["recurrent.gate.up"].flatten(1)
        return {
            "q_proj.weight": folding.rows(weights["q"], factor),
            "k_proj.weight": weights["k"],
            "v_proj.weight": weights["v"],
            "gk_proj.0.weight": folding.padded(down, self.RANK).T,
            "gk_proj.1.weight": F.pad(up, (0, 0, 0, self.RANK - len(up))).T,
            "gk_proj.1.bias": parts["recurrent.gate.bias"].flatten(),
            "g_norm.weight": parts["recurrent.gate.bias"].new_ones(shape.value_dim),
            "o_proj.weight": folding.columns(weights["o"], scales(norm, parts, shape.heads, shape.value_dim)),
        }

    def settings(self, given: Given) -> dict[str, Any]:
        shape, features = given.shape, given.mixer["feature_map"]["name"]
        return {
            "expand_k": shape.heads * shape.key_dim / shape.hidden_dim(),
            "expand_v": shape.heads * shape.value_dim / shape.hidden_dim(),
            "num_heads": shape.heads,
            "num_kv_heads": shape.kv_heads,
            "feature_map": None if features == "identity" else features,
            "use_short_conv": False,
            "use_output_gate": False,
            "elementwise_affine": True,
        }
