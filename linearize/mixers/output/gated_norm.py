"""A norm of each head's output under a low-rank sigmoid gate (Kimi Team 2025, arXiv 2510.26692, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, fill, put, wide
from linearize.mixers.low_rank import LowRank
from linearize.mixers.options import WIDEST, number
from linearize.mixers.output import OUTPUTS, Output


@OUTPUTS.register("gated_norm")
class GatedNorm(Output):
    """y / rms(y) * scale * sigmoid(base + x W1 W2), scale and base [H, V].

    W1 = 0 at the start: the gate is sigmoid(bias) for every token, and the scale makes up for it, so that the output
    has the rms `start`. Published layers have one scale [V] for all heads.

    Limitations: as `norm`, the size of the mixer's output carries nothing.
    """

    EPSILON = 1e-5
    uses_hidden = True
    normalizes = True

    @dataclass
    class Config(Output.Config):
        rank: int = number(64, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2 [rank, H V]; published: the head's width."""
        start: float = number(1.0, above=0)
        """The output's rms at the start; means of values are small, so teachers' outputs have one of 0.03 to 0.5."""
        bias: float = number(0.0, least=-50, most=50)
        """base at the start: 0 opens the gate by half."""
        shift: bool = False
        """Token shift: x + mix (x_before - x) into W1, mix learned for each dim of x and zero at the start."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.gate = LowRank(shape.hidden_dim(), config.rank, shape.heads, shape.value_dim, tanh=False)
        self.scale = nn.Parameter(torch.empty(shape.heads, shape.value_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.gate.start(self.config.bias)
        fill(self.scale, self.config.start * (1 + math.exp(-self.config.bias)))

    def fit(self, y: Tensor, hidden: Tensor, target: Tensor) -> None:
        """The scale of each head and dim by least squares, under the gate as it stands."""
        put(self.scale, torch.ones_like(self.scale))
        unit = self.changed(y[None], hidden[None])[0]
        put(self.scale, (unit * target).sum(0) / unit.square().sum(0).clamp_min(1e-30))

    def stretch(self, factor: Tensor) -> bool:
        put(self.scale, self.scale * factor)
        return True

    def changed(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        y = wide(y)
        y = y * (y.square().mean(-1, keepdim=True) + self.EPSILON).rsqrt()
        return y * self.scale.to(y.dtype) * self.gate(hidden).sigmoid()
