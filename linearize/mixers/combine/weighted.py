"""Weights on the two branches' outputs (Liger, Lan et al. 2025, arXiv 2503.01496, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers import fits
from linearize.mixers.base import LayerShape, Part, Partial, accumulator, fill, put
from linearize.mixers.combine import COMBINES, Combine, blend
from linearize.mixers.options import choice_problems, number


@COMBINES.register("weighted")
class FixedWeights(Combine):
    """y = window * y_window + recurrent * y_recurrent, each branch normalized by itself.

    Liger writes one half and one half, and its recurrent branch sees the window's tokens too (window.overlap: true)
    and has no normalizer, so its output enters as it is. Where a branch has seen no key at all, which cannot happen
    in Liger, the other one takes its weight: see `blend`. With ``per: layer`` the two numbers are fixed; with ``per:
    head`` each head has its own two, which a calibration sets and a stage may train.
    """

    window_weight: nn.Parameter | None
    recurrent_weight: nn.Parameter | None

    @dataclass
    class Config(Part.Config):
        window: float = number(0.5, above=0)
        """Weight of the window's output at the start; to drop a branch, name it none."""
        recurrent: float = number(0.5, above=0)
        """Weight of the recurrent branch's output at the start."""
        per: str = "layer"
        """layer: fixed, or head: parameters."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(per=(self.per, ("layer", "head")))

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config
        for name in ("window_weight", "recurrent_weight"):
            made = nn.Parameter(torch.empty(shape.heads)) if config.per == "head" else None
            self.register_parameter(name, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.window_weight is not None and self.recurrent_weight is not None:
            fill(self.window_weight, self.config.window)
            fill(self.recurrent_weight, self.config.recurrent)

    def fit(
        self,
        window: Partial,
        recurrent: Partial,
        target: Tensor,
        hidden: Tensor | None,
        resize: Callable[[Tensor], bool],
    ) -> None:
        """Both weights of each head, neither below zero, by least squares."""
        if self.window_weight is not None and self.recurrent_weight is not None:
            near, far = fits.two_scales(window.normalized()[0], recurrent.normalized()[0], target)
            put(self.window_weight, near)
            put(self.recurrent_weight, far)

    def lower(self, heard: float) -> bool:
        if self.window_weight is None or self.recurrent_weight is None:
            return False
        put(self.window_weight, 1 + heard * (self.window_weight - 1))
        put(self.recurrent_weight, heard * self.recurrent_weight)
        return True

    def resize(self, factor: Tensor) -> bool:
        if self.window_weight is None or self.recurrent_weight is None:
            return False
        positive = factor.clamp_min(0)
        put(self.window_weight, self.window_weight * positive)
        put(self.recurrent_weight, self.recurrent_weight * positive)
        return True

    def forward(self, window: Partial, recurrent: Partial, hidden: Tensor | None = None) -> Tensor:
        numerator = window.numerator
        whole, dtype = numerator[..., 0], accumulator(numerator.dtype)
        if self.window_weight is None or self.recurrent_weight is None:
            near = torch.full_like(whole, self.config.window, dtype=dtype)
            return blend(window, recurrent, near, torch.full_like(near, self.config.recurrent))
        near, far = self.window_weight.to(dtype), self.recurrent_weight.to(dtype)
        return blend(window, recurrent, near.expand_as(whole), far.expand_as(whole))
