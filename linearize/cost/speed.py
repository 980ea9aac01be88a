"""Tokens a second of a stage: products at a share of the peak, and memory traffic in multiples of what is kept.

A token takes FLOPs / (PRODUCTS x peak) + TRAFFIC x bytes / bandwidth + LAUNCH x kernels / tokens of a micro-step.
MFU is what comes out of it, FLOPs / (time x peak) (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). All constants
are fitted to docs/results/train-h200.json; LAUNCH is the time of a kernel however small. One card of another kind, or a
model larger than 8B, is extrapolation, and the plan says so.
"""

from __future__ import annotations

from linearize.cost.cards import Card
from linearize.cost.memory import Sizes, moved_bytes, transfer_bytes

PRODUCTS = 0.62
TRAFFIC = {"transfer": 9.0, "lora": 21.0, "lora_kl": 19.0, "all": 19.0, "all_kl": 22.0}
LAUNCH = 5e-6
KERNELS = {"transfer": 66, "lora": 115, "lora_kl": 140, "all": 95, "all_kl": 140}
"""A layer, as the profiles of train-h200.json counted them."""
MEASURED = {"transfer": 8.0e9, "lora": 0.135e9, "lora_kl": 8.0e9, "all": 1.24e9, "all_kl": 1.24e9}
"""Parameters of the largest model with which each kind of stage was measured."""
SCALING = 0.9
"""Share of linear that several cards are assumed to reach. Not measured."""


def seconds(
    sizes: Sizes, kind: str, flops: float, tokens: int, card: Card, *, checkpointing: bool = False
) -> float:
    """Of one token on one card.

    Args:
        sizes, kind, tokens: as in `memory.parts`.
        flops: model FLOPs of a token (`bench.flops.per_token`).
        card: where.
        checkpointing: adds a forward pass: a third of the products and of the traffic.
    """
    moved = transfer_bytes(sizes) if kind == "transfer" else moved_bytes(sizes)
    again = 4 / 3 if checkpointing and kind != "transfer" else 1.0
    kind = kind.replace("mixers", "lora")  # of which there are measurements
    products = flops / (PRODUCTS * card.peak)
    traffic = TRAFFIC[kind] * moved * sizes.layers / card.bandwidth
    return again * (products + traffic) + LAUNCH * KERNELS[kind] * sizes.layers / tokens


def rows(sizes: Sizes, kind: str, card: Card, *, experts: bool = False) -> str:
    """Which measurements the speed rests on, in words."""
    base = kind.replace("mixers", "lora")
    said = f"train-h200.json, {base} up to {MEASURED[base] / 1e9:.3g}B"
    beyond = [f"{sizes.teacher / 1e9:.3g}B"] if sizes.teacher > 1.2 * MEASURED[base] else []
    beyond += [card.name] if card.name != "h200" else []
    beyond += ["mixers alone"] if kind != base else []
    beyond += ["a mixture of experts, by what a token meets"] if experts else []
    return said + (f"; extrapolated to {', '.join(beyond)}" if beyond else "")
