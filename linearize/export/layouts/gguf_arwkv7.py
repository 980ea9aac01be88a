"""llama.cpp's `arwkv7`: RWKV-7's time mixing (ARWKV, arXiv 2501.15570) inside a transformer's norms and SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.export.layouts import folding
from linearize.export.layouts.difference import Difference, said
from linearize.export.layouts.layer import ForeignLayer, Given, Layer
from linearize.export.layouts.norm import head_norm, scales
from linearize.export.layouts.rwkv7_rule import rule_differences


def filling(given: Given) -> Iterator[Difference]:
    """What keeps heads from being those of llama.cpp's RWKV: square states that fill the model's width.

    Its CUDA kernels take heads of 64 and 128; on processors with AVX-512 it reads 64 dims at once, whether they belong
    to the head or not, and would answer wrong.
    """
    shape = given.shape
    if shape.key_dim not in (64, 128):
        yield Difference("heads", f"of {shape.key_dim}", "of 64 or 128")
    if shape.heads * shape.key_dim != shape.hidden_dim() or shape.key_dim != shape.value_dim:
        ours = (
            f"{shape.heads} heads of {shape.key_dim} and {shape.value_dim} in a width of {shape.hidden_dim()}"
        )
        yield Difference("heads", ours, "square heads that fill the width")


class ARWKV7(ForeignLayer):
    """`rwkv7_rule`, with a layer norm of each head behind it (epsilon 64e-5) or none.

    The gate sigmoid(x G1) G2 is ours less one: a column of G1 that is zero has a sigmoid of one half, and 2 under it in
    G2 is one. The first layer's values are mixed in by sigmoid(v0 + x V1 V2), which v0 = -100 makes zero where they are
    not; its own such tensors are read by nobody. There are no key-value heads: theirs are written once for every query
    head. Queries take the scale, and the root of the quotient of the two norms'
    epsilons.
    """

    name = "arwkv7"
    model = "arwkv7"
    EPSILON = 64e-5
    shifts_output = True
    WIDTH = 32
    """Multiples that low ranks are padded to, and the width of what is not used."""
    SHUT = -100.0

    def differences(self, given: Given) -> Iterator[Difference]:
        yield from rule_differences(given)
        norm = head_norm(given.mixer)
        if given.mixer["normalizer"]["name"] != "none" and not (norm is not None and norm.centered):
            theirs = "none, or a layer norm of each head (group_norm, kind layer)"
            yield Difference("normalizer", said(given.mixer, "normalizer"), theirs)
        yield from filling(given)

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        shape, mixer, parts = layer.given.shape, layer.given.mixer, layer.parts
        width, gated = shape.hidden_dim(), mixer["output"]["name"] == "gate"
        gate, rate = "recurrent.gate.logits", "recurrent.update.rate"
        nothing = torch.zeros(width)

        def per_head(x: Tensor) -> Tensor:
            """[M, F] -> [H F]."""
            return folding.shared(x, len(x), shape.heads // len(x)).flatten()

        def up(x: Tensor) -> Tensor:
            """[r, M, F] -> [H F, r]."""
            return torch.stack([per_head(one) for one in x.unbind()], -1)

        factor = parts["recurrent.update.scale"].double()
        if mixer["feature_map"]["scaled"]:
            factor = factor * shape.scaling
        norm = head_norm(mixer)
        made = {}
        if norm is not None:
            factor = factor * math.sqrt(self.EPSILON / norm.eps)
            made = {
                "time_mix_ln.weight": scales(norm, parts, shape.heads, shape.value_dim).float(),
                "time_mix_ln.bias": nothing,
            }
        w, a = (parts.get(f"recurrent.{part}.mix", nothing) for part in ("gate", "update"))
        r, k, v = parts.get("recurrent.update.inputs.mix", [nothing] * 3)
        lerp = [r, w, k, v, a, *([parts.get("output.mix", nothing)] if gated else [])]
        if gated:
            down, out = parts["output.down"].float(), parts["output.up"].flatten(1).float()
            spare = -(len(out) + 1) % self.WIDTH
            ones = torch.full((1, width), 2.0)
            made["time_mix_g1.weight"] = F.pad(down, (0, 1 + spare)).T
            made["time_mix_g2.weight"] = F.pad(torch.cat([out, ones]), (0, 0, 0, spare)).T
        rates, first = mixer["update"]["rank"], "recurrent.update.first.share"
        if layer.index == 0 or not mixer["update"]["first_values"]:
            low = rates if layer.index == 0 else self.WIDTH
            mixing = torch.full((width,), self.SHUT), torch.zeros(low, width), torch.zeros(width, low)
        else:
            mixing = per_head(parts[f"{first}.base"]), parts[f"{first}.down"].T, up(parts[f"{first}.up"])
        return made | {
            "time_mix_lerp_fused.weight": torch.stack([x.float() for x in lerp])[:, None, None],
            "time_mix_w0.weight": per_head(parts[f"{gate}.base"]),
            "time_mix_w1.weight": parts[f"{gate}.down"].T,
            "time_mix_w2.weight": up(parts[f"{gate}.up"]),
            "time_mix_a0.weight": per_head(parts[f"{rate}.base"]),
            "time_mix_a1.weight": parts[f"{rate}.down"].T,
            "time_mix_a2.weight": up(parts[f"{rate}.up"]),
            **{f"time_mix_v{number}.weight": part for number, part in enumerate(mixing)},
            "time_mix_k_k.weight": per_head(parts["recurrent.update.removal"]),
            "time_mix_k_a.weight": per_head(parts["recurrent.update.share"]),
            "time_mix_r_k.weight": nothing,
            "time_mix_receptance.weight": folding.rows(
                layer.weights["q"], factor.repeat_interleave(shape.key_dim)
            ),
            "time_mix_key.weight": folding.shared(layer.weights["k"], shape.kv_heads, shape.group),
            "time_mix_value.weight": folding.shared(layer.weights["v"], shape.kv_heads, shape.group),
            "time_mix_output.weight": layer.weights["o"],
        }

    def settings(self, given: Given) -> dict[str, Any]:
        mixer = given.mixer
        found = {
            "wkv_head_size": given.shape.key_dim,
            "token_shift_count": 1,
            "head_count": 0,
            "decay_lora_rank": mixer["gate"]["rank"],
            "iclr_lora_rank": mixer["update"]["rank"],
            "value_residual_mix_lora_rank": mixer["update"]["first_rank"]
            if mixer["update"]["first_values"]
            else self.WIDTH,
        }
        if mixer["output"]["name"] == "gate":
            rank = mixer["output"]["rank"] + 1
            found["gate_lora_rank"] = rank + -rank % self.WIDTH
        return found
