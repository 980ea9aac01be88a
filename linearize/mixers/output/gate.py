"""A low-rank output gate that is exactly one at the start (ARWKV, Yueyu et al. 2025, arXiv 2501.15570)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, fill, wide
from linearize.mixers.options import WIDEST, number
from linearize.mixers.output import OUTPUTS, Output


@OUTPUTS.register("gate")
class OutputGate(Output):
    """y * (1 + sigmoid(x W1) W2), W2 = 0 at the start: what was copied from the teacher goes through unchanged."""

    uses_hidden = True

    @dataclass
    class Config(Part.Config):
        rank: int = number(32, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2 [rank, H V]."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.down = nn.Parameter(torch.empty(shape.hidden_dim(), config.rank))
        self.up = nn.Parameter(torch.empty(config.rank, shape.heads, shape.value_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down, std=0.02)
        fill(self.up, 0.0)

    def forward(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        gate = (hidden @ self.down.to(hidden.dtype)).sigmoid()
        return wide(y) * (1 + wide(torch.einsum("btr,rhv->bthv", gate, self.up.to(gate.dtype))))
