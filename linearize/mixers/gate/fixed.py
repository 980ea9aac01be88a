"""Fixed decay per head (RetNet, Sun et al. 2023, arXiv 2307.08621; SUPRA, Mercat et al. 2024, arXiv 2405.06640)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape, Part, accumulator
from linearize.mixers.gate import GATES, Gate
from linearize.mixers.options import choice_problems


@GATES.register("fixed")
class FixedGate(Gate):
    """decay_h = 1 - 2^(-5 - h) (``retnet``), or exp(-2^(-8 (h + 1) / H)) (``alibi``, SUPRA's and Lightning's slopes).

    Not learned and without parameters. Decays differ between query heads, so the state is kept per query head.

    Limitations: RetNet's slopes are closer to one (0.969 and up), ALiBi's reach back some 256 tokens at most. Where H
    is no power of two, ALiBi's code interleaves the slopes of two that are; here they are the formula's.
    """

    uses_hidden = False

    @dataclass
    class Config(Part.Config):
        slopes: str = "retnet"
        """retnet or alibi."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(slopes=(self.slopes, ("retnet", "alibi")))

    def __init__(self, config: Config, shape: LayerShape, feature_dim: int) -> None:
        super().__init__(config, shape, feature_dim)
        self.heads = shape.heads
        self.slopes = config.slopes

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        # computed per call in float64: a buffer would be cast to the model's dtype, where 1 - 2^-9 is 1
        heads = torch.arange(self.heads, dtype=torch.float64, device=k.device)
        if self.slopes == "retnet":
            log_decay = torch.log1p(-torch.exp2(-5.0 - heads))
        else:
            log_decay = -torch.exp(-8.0 * math.log(2) * (heads + 1) / self.heads)
        return log_decay.to(accumulator(k.dtype)).expand(*k.shape[:2], self.heads)
