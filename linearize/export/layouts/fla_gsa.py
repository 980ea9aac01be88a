"""fla's gated slot attention (Zhang et al. 2024, arXiv 2409.07146): what no composition of ours is yet."""

from __future__ import annotations

from collections.abc import Iterator

from linearize.export.layouts.difference import Difference, absent, rotated, said, unlike
from linearize.export.layouts.layer import ForeignLayer, Given


class GSA(ForeignLayer):
    """Slots as `update.slots` has them, between a SiLU on the values and one on what is read.

    The gate's logits are a full matrix times x, without a bias, their sigmoid's logarithm divided by 8 (no more is
    handed on by the model). What is read goes through SiLU and an RMS norm over all heads together. No mixer part
    computes those two, so every composition differs.
    """

    name = "GSA"
    model = "gsa"
    DIVISOR = 8.0

    def differences(self, given: Given) -> Iterator[Difference]:
        mixer, gate, conv = given.mixer, given.mixer["gate"], given.mixer["short_conv"]
        yield from absent(mixer, "window")
        yield from unlike(mixer, "update", mixer["update"]["name"] == "slots", "slots")
        yield from unlike(mixer, "feature_map", mixer["feature_map"]["name"] == "relu", "relu, swish or t2r")
        if gate["name"] != "low_rank" or gate["divisor"] != self.DIVISOR:
            yield Difference(
                "gate", said(mixer, "gate"), f"sigmoid(x W)^(1/{self.DIVISOR:.0f}) for each slot"
            )
        else:
            yield Difference("gate", "a bias on its logits", "none")
        if not (conv["name"] == "depthwise" and "v" in conv["roles"] and conv["activation"] == "silu"):
            yield Difference("values", "as they are", "through SiLU")
        ours = said(mixer, "normalizer" if mixer["output"]["name"] == "none" else "output")
        yield Difference("output", ours, "SiLU, then an RMS norm over all heads together")
        yield from rotated(mixer, given.shape)
