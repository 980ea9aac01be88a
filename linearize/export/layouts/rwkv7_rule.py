"""RWKV-7's rule as fla and llama.cpp have it (Peng et al. 2025, arXiv 2503.14456), against a composition."""

from __future__ import annotations

from collections.abc import Iterator

from linearize.export.layouts.difference import Difference, absent, as_they_are, rotated, said, unlike
from linearize.export.layouts.layer import Given


def rule_differences(given: Given) -> Iterator[Difference]:
    """Everything but the norm behind the rule.

    Decays exp(-e^(-1/2) sigmoid(b + tanh(x W1) W2)); kappa = normalize(k_k * k) is taken out at the rate a, k (1 + (a -
    1) k_a) written; the answer times sigmoid(x G1) G2. The bonus is zero.
    """
    mixer, update = given.mixer, given.mixer["update"]
    yield from absent(mixer, "window", "short_conv")
    yield from unlike(mixer, "feature_map", as_they_are(mixer), "identity")
    yield from unlike(mixer, "gate", mixer["gate"]["name"] == "rwkv7", "rwkv7")
    if update["name"] != "rwkv7":
        yield Difference("update", said(mixer, "update"), "rwkv7 (balanced False)")
    elif update["balanced"]:
        yield Difference(
            "update.balanced", "balanced keys, k (1 - w + a) written and k / |k| taken out", "balanced False"
        )
    yield from unlike(
        mixer, "output", mixer["output"]["name"] in ("gate", "none"), "none, or a gate sigmoid(x G1) G2"
    )
    yield from rotated(mixer, given.shape)
