"""A low-rank output gate that is exactly one at the start (ARWKV, Yueyu et al. 2025, arXiv 2501.15570)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers import fits
from linearize.mixers.base import LayerShape, fill, put, wide
from linearize.mixers.options import WIDEST, number
from linearize.mixers.output import OUTPUTS, Output


@OUTPUTS.register("gate")
class OutputGate(Output):
    """y * (1 + sigmoid(x W1) W2), W2 = 0 at the start: what was copied from the teacher goes through unchanged."""

    uses_hidden = True
    scales = True
    WIDTH = 8
    """Channels that a calibration sets at most: its equations grow with their square."""

    @dataclass
    class Config(Output.Config):
        rank: int = number(32, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2 [rank, H V]."""
        shift: bool = False
        """Token shift: x + mix (x_before - x) into W1, mix learned for each dim of x and zero at the start."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.down = nn.Parameter(torch.empty(shape.hidden_dim(), config.rank))
        self.up = nn.Parameter(torch.empty(config.rank, shape.heads, shape.value_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.down, std=0.02)
        fill(self.up, 0.0)

    def fit(self, y: Tensor, hidden: Tensor, target: Tensor) -> None:
        """A gate from the hidden state by ridge regression, in the first WIDTH of the bottleneck's channels.

        The first column of W1 becomes zero, so that its sigmoid, one half whatever comes, can carry a factor on each
        head and dim; the next ones become the leading principal directions of the hidden states. Later channels stay
        as they were, with rows of zero in W2.
        """
        count = min(self.down.shape[1], self.WIDTH, len(self.down) + 1)
        down = self.down.detach().clone()
        down[:, 0] = 0
        if count > 1:
            down[:, 1:count] = fits.components(hidden, count - 1).to(down)
        put(self.down, down)
        features = (hidden @ down[:, :count].to(hidden.dtype)).sigmoid()
        centers = features.mean(0)
        centers[0] = 0
        found = fits.gate(y, target, features - centers)
        # the gate is 1 + f W2, what was solved (f - centers) W2, and the constant feature is one half
        constant = found[0] - 2 * (1 + torch.einsum("r,rhv->hv", centers.double(), found))
        up = torch.zeros_like(self.up)
        up[:count] = torch.cat([constant[None], found[1:]]).to(up)
        put(self.up, up)

    def stretch(self, factor: Tensor) -> bool:
        # factor (1 + f W2), the first feature being one half since `fit`
        up = self.up * factor
        up[0] += 2 * (factor - 1)
        put(self.up, up)
        return True

    def changed(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        gate = (hidden @ self.down.to(hidden.dtype)).sigmoid()
        return wide(y) * (1 + wide(torch.einsum("btr,rhv->bthv", gate, self.up.to(gate.dtype))))
