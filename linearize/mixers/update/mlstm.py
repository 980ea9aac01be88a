"""mLSTM's rule: additive with an exponential input gate (xLSTM, Beck et al. 2024, arXiv 2405.04517, eq. 19-27)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, fill, product
from linearize.mixers.options import number
from linearize.mixers.statistics import Statistics
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.additive import Additive

BIASES = (-2.0, -4.0, -6.0, -8.0, -10.0)
"""Of the input gate, that a calibration tries; the last one is where xLSTM 7B starts."""


@UPDATES.register("mlstm")
class MLSTM(Additive):
    """S_t = f_t S_{t-1} + i_t k_t v_t^T, n_t likewise of i_t k_t, i = exp(cap(x W + b)) for each head of the state.

    cap(z) = c tanh(z / c) bounds the exponent, as in xLSTM 7B (arXiv 2503.13427), so that sums stay within float32
    without the running maximum that the first paper takes off. W = b = 0 at the start, where it is the additive rule. f
    is the gate's decay; with the normalizer `bounded` signed features of queries and keys are mLSTM's own.
    """

    decays: ClassVar[tuple[str, ...]] = ("head", "feature")
    dense = False
    takes_products: ClassVar[bool] = False
    uses_hidden = True

    @dataclass
    class Config(Additive.Config):
        cap: float = number(15.0, above=0, most=30)
        """c."""

    def make(self, shape: LayerShape) -> None:
        super().make(shape)
        self.cap = self.config.cap
        self.input_weight = nn.Parameter(torch.empty(shape.hidden_dim(), self.heads))
        self.input_bias = nn.Parameter(torch.empty(self.heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill(self.input_weight, 0.0)
        fill(self.input_bias, 0.0)

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """Gates down to the published one: where sums stay below the floor of `bounded`, i is the output's size."""
        return [{"input_bias": torch.full_like(self.input_bias, bias)} for bias in BIASES]

    def keys(self, stream: Stream) -> Tensor:
        assert stream.hidden is not None
        logits = product(stream.hidden, self.input_weight)
        logits = logits + self.input_bias.to(logits.dtype)
        # the key of a token that nobody may see is zero
        return stream.k * (self.cap * (logits / self.cap).tanh()).exp()[..., None].to(stream.k.dtype)
