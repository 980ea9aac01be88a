"""An RMS norm of each head's output with a learned scale per head and dim (fla's layers, Mamba-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, fill, put, wide
from linearize.mixers.options import number
from linearize.mixers.output import OUTPUTS, Output


@OUTPUTS.register("norm")
class OutputNorm(Output):
    """y / rms(y) * scale [H, V], the scale at `start`.

    Limitations: RADLADS found it to hurt conversions (arXiv 2505.03005, section 4); offered for methods that have it.
    """

    EPSILON = 1e-6
    normalizes = True

    @dataclass
    class Config(Output.Config):
        start: float = number(1.0, above=0)
        """Scale at the start; the rms of the teacher's outputs is the value that matches it."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.scale = nn.Parameter(torch.empty(shape.heads, shape.value_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill(self.scale, self.config.start)

    def fit(self, y: Tensor, hidden: Tensor, target: Tensor) -> None:
        """The scale of each head and dim by least squares."""
        put(self.scale, torch.ones_like(self.scale))
        unit = self.changed(y, None)
        put(self.scale, (unit * target).sum(0) / unit.square().sum(0).clamp_min(1e-30))

    def stretch(self, factor: Tensor) -> bool:
        put(self.scale, self.scale * factor)
        return True

    def changed(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        y = wide(y)
        return y * (y.square().mean(-1, keepdim=True) + self.EPSILON).rsqrt() * self.scale.to(y.dtype)
