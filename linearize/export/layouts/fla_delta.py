"""fla's DeltaNet (Yang et al. 2024, arXiv 2406.06484) and Gated DeltaNet (2412.06464), models of the same names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from linearize.export.layouts import folding
from linearize.export.layouts.difference import Difference, absent, rotated, said, unlike
from linearize.export.layouts.layer import ForeignLayer, Given, Layer
from linearize.export.layouts.norm import head_norm, norm_differences, quotient, scales


class DeltaNet(ForeignLayer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = RMSNorm(K^(-1/2) S_t^T q_t), |q| = |k| = 1.

    q, k and v come through a convolution with SiLU behind it; beta = sigmoid(x W), without a bias. The norm's epsilon
    is that of the model's own norms, and nothing in front of it can take a factor: lengths are one, and SiLU bends
    values. There are no key-value heads: theirs are written once for every query head.

    Equal but for the 1e-6 that fla adds to squared lengths before it takes the root.
    """

    name = "DeltaNet"
    model = "delta_net"
    GATES = ("none",)
    GATE = "none"

    def differences(self, given: Given) -> Iterator[Difference]:
        mixer, conv, update = given.mixer, given.mixer["short_conv"], given.mixer["update"]
        yield from absent(mixer, "window")
        bent = conv["name"] == "depthwise" and conv["roles"] == "qkv" and conv["activation"] == "silu"
        yield from unlike(mixer, "short_conv", bent, "depthwise on q, k and v with SiLU, or SiLU alone")
        yield from unlike(
            mixer, "feature_map", mixer["feature_map"]["name"] == "identity", "identity of length 1"
        )
        yield from unlike(mixer, "gate", mixer["gate"]["name"] in self.GATES, self.GATE)
        if update["name"] != "delta" or update["start"]:
            yield Difference("update", said(mixer, "update"), "delta")
        else:
            if update["bias"]:
                yield Difference("update.bias", "beta has a bias", "none")
            if update["rescales"]:
                yield Difference("update.rescales", "a learned scale per head", "1 / sqrt(K)")
        yield from norm_differences(mixer)
        norm = head_norm(mixer)
        if norm is not None and quotient(norm.eps, given.eps) != 1:
            yield Difference("epsilon", f"{norm.eps:g} under the norm", f"that of the model, {given.eps:g}")
        yield from rotated(mixer, given.shape)

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        shape, weights, parts = layer.given.shape, layer.weights, layer.parts
        norm = head_norm(layer.given.mixer)
        assert norm is not None, "a composition with differences was to be written"
        beta = parts["recurrent.update.beta_weight"].T
        made = {
            "q_proj.weight": weights["q"],
            "k_proj.weight": folding.shared(weights["k"], shape.kv_heads, shape.group),
            "v_proj.weight": folding.shared(weights["v"], shape.kv_heads, shape.group),
            "b_proj.weight": folding.shared(beta, len(beta), shape.heads // len(beta)),
            "o_norm.weight": beta.new_ones(shape.value_dim),
            "o_proj.weight": folding.columns(weights["o"], scales(norm, parts, shape.heads, shape.value_dim)),
        }
        for role, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            filters = parts[f"recurrent.short_conv.filters.{role}"].flatten(0, 1)[:, None]
            made[f"{role}_conv1d.weight"] = folding.shared(filters, heads, shape.heads // heads)
        return made

    def settings(self, given: Given) -> dict[str, Any]:
        shape = given.shape
        return {
            **self.common(given),
            "expand_k": shape.heads * shape.key_dim / shape.hidden_dim(),
            "expand_v": shape.heads * shape.value_dim / shape.hidden_dim(),
            "use_beta": True,
            "use_output_norm": True,
            "qk_norm": "l2",
            "qk_activation": "silu",
        }

    def common(self, given: Given) -> dict[str, Any]:
        """Entries that both models have."""
        return {
            "num_heads": given.shape.heads,
            "use_gate": False,
            "use_short_conv": True,
            "conv_size": given.mixer["short_conv"]["taps"],
            "allow_neg_eigval": False,
        }


class GatedDeltaNet(DeltaNet):
    """`DeltaNet` with S_{t-1} under Mamba-2's decay per head, exp(-exp(A) softplus(x W + b))."""

    name = "Gated DeltaNet"
    model = "gated_deltanet"
    GATES = ("mamba2",)
    GATE = "mamba2"

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        parts = layer.parts
        return {
            **super().tensors(layer),
            "a_proj.weight": parts["recurrent.gate.weight"].T,
            "dt_bias": parts["recurrent.gate.dt_bias"],
            "A_log": parts["recurrent.gate.a_log"],
        }

    def settings(self, given: Given) -> dict[str, Any]:
        shape = given.shape
        return {
            **self.common(given),
            "head_dim": shape.key_dim,
            "expand_v": shape.value_dim / shape.key_dim,
            "num_v_heads": shape.heads,
        }
