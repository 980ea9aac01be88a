"""Fixed weights on the two branches' outputs (Liger, Lan et al. 2025, arXiv 2503.01496, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape, Part, Partial, accumulator
from linearize.mixers.combine import COMBINES, Combine, blend
from linearize.mixers.options import number


@COMBINES.register("weighted")
class FixedWeights(Combine):
    """y = window * y_window + recurrent * y_recurrent, each branch normalized by itself; nothing is learned.

    Liger writes one half and one half, and its recurrent branch sees the window's tokens too (window.overlap: true)
    and has no normalizer, so its output enters as it is. Where a branch has seen no key at all, which cannot happen
    in Liger, the other one takes its weight: see `blend`.
    """

    @dataclass
    class Config(Part.Config):
        window: float = number(0.5, above=0)
        """Weight of the window's output; to drop a branch, name it none."""
        recurrent: float = number(0.5, above=0)
        """Weight of the recurrent branch's output."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config

    def forward(self, window: Partial, recurrent: Partial, hidden: Tensor | None = None) -> Tensor:
        numerator = window.numerator
        near = torch.full_like(numerator[..., 0], self.config.window, dtype=accumulator(numerator.dtype))
        far = torch.full_like(near, self.config.recurrent)
        return blend(window, recurrent, near, far)
