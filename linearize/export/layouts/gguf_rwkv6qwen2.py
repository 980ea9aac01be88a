"""llama.cpp's `rwkv6qwen2`: RADLADS' balanced RWKV-6 (arXiv 2505.03005) inside a transformer's norms and SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linearize.export.layouts import folding
from linearize.export.layouts.difference import Difference, absent, as_they_are, rotated, unlike
from linearize.export.layouts.gguf_arwkv7 import filling
from linearize.export.layouts.layer import ForeignLayer, Given, Layer
from linearize.mixers.gate.rwkv6 import RWKV6Gate


class RWKV6Qwen2(ForeignLayer):
    """S_t = diag(w_t) S_{t-1} + ((1 - w_t) * k_t) v_t^T, o_t = sigmoid(x G) * (K^(-1/2) S_t^T q_t), GQA and biases.

    w = exp(-exp(b + tanh(x W1) W2)). The gate cannot be shut off; G = 0 makes it one half, for which the output
    projection makes up. Our decays stop at exp(-5), and theirs do not: where no token can come so far (the sum of |W2|
    says so), both are one function.
    """

    name = "rwkv6qwen2"
    model = "rwkv6qwen2"
    biases = frozenset({"q", "k", "v"})
    EXTRA = 32
    """Width of the mixtures of tokens that the text itself makes, all zero here."""

    def differences(self, given: Given) -> Iterator[Difference]:
        mixer, update = given.mixer, given.mixer["update"]
        yield from absent(mixer, "window", "short_conv")
        yield from unlike(mixer, "feature_map", as_they_are(mixer), "identity")
        yield from unlike(mixer, "gate", mixer["gate"]["name"] == "rwkv6", "rwkv6")
        balanced = (
            update["name"] == "rwkv6" and update["balanced"] and not update["bonus"] and not update["start"]
        )
        if update["name"] == "additive" and not update["start"]:
            yield Difference("update.keys", "keys as they are", "times one minus their decay")
        else:
            yield from unlike(mixer, "update", balanced, "rwkv6")
        yield from unlike(mixer, "normalizer", mixer["normalizer"]["name"] == "none", "none")
        if mixer["output"]["name"] == "gate":
            yield Difference(
                "output", "a gate 1 + sigmoid(x W1) W2, which any number can come out of", "sigmoid(x G)"
            )
        else:
            yield from unlike(
                mixer, "output", mixer["output"]["name"] == "none", "none, or a gate sigmoid(x G)"
            )
        yield from rotated(mixer, given.shape)
        yield from filling(given)

    def found(self, layer: Layer) -> Iterator[Difference]:
        yield from super().found(layer)
        base, up = (layer.parts[f"recurrent.gate.logits.{name}"].double() for name in ("base", "up"))
        highest = float((base + up.abs().sum(0)).max())
        if highest > math.log(-RWKV6Gate.LOWEST):
            ours = f"decays that stop at exp({RWKV6Gate.LOWEST:g}), which a token of layer {layer.index} may reach"
            yield Difference("gate", ours, "no such bound")

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        shape, parts, weights = layer.given.shape, layer.parts, layer.weights
        width, gate = shape.hidden_dim(), "recurrent.gate.logits"

        def per_head(x: Tensor) -> Tensor:
            """[M, F] -> [H F]."""
            return folding.shared(x, len(x), shape.heads // len(x)).flatten()

        scaling = shape.scaling if layer.given.mixer["feature_map"]["scaled"] else 1.0
        factor = round(scaling * math.sqrt(shape.key_dim), 12)
        mix, nothing = parts.get("recurrent.gate.mix"), torch.zeros(width)
        lerp = [nothing if mix is None else mix.float(), *[nothing] * 4]
        made = {
            "time_mix_w1.weight": torch.zeros(5 * self.EXTRA, width),
            "time_mix_w2.weight": torch.zeros(5, width, self.EXTRA),
            "time_mix_lerp_x.weight": torch.zeros(1, 1, width),
            "time_mix_lerp_fused.weight": torch.stack(lerp)[:, None, None],
            "time_mix_decay.weight": per_head(parts[f"{gate}.base"]),
            "time_mix_decay_w1.weight": parts[f"{gate}.down"].T,
            "time_mix_decay_w2.weight": torch.stack([per_head(x) for x in parts[f"{gate}.up"].unbind()], -1),
            "time_mix_receptance.weight": folding.rows(weights["q"], factor),
            "time_mix_key.weight": weights["k"],
            "time_mix_value.weight": weights["v"],
            "time_mix_gate.weight": torch.zeros(width, width),
            "time_mix_output.weight": weights["o"] * 2,
        }
        for role, name in (("q", "receptance"), ("k", "key"), ("v", "value")):
            if f"{role}.bias" in weights:
                made[f"time_mix_{name}.bias"] = weights[f"{role}.bias"] * (factor if role == "q" else 1)
        return made

    def settings(self, given: Given) -> dict[str, Any]:
        return {
            "wkv_head_size": given.shape.key_dim,
            "token_shift_count": 1,
            "head_count": 0,
            "head_count_kv": given.shape.kv_heads,
            "time_mix_extra_dim": self.EXTRA,
            "time_decay_extra_dim": given.mixer["gate"]["rank"],
        }
