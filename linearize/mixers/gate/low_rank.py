"""A low-rank gate from the hidden state, per feature (GLA, Yang et al. 2023, arXiv 2312.06635, section 4.4; LAWCAT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, fill, wide
from linearize.mixers.gate import GATES, Gate, log_sigmoid, sigmoid_logit
from linearize.mixers.options import WIDEST, number


@GATES.register("low_rank")
class LowRankGate(Gate):
    """log decay = logsigmoid(x W1 W2 + b) / divisor, per key-value head and feature.

    W ~ N(0, 0.006) and b = 0 as LAWCAT initializes: decay 0.958 at the start, with the divisor of 16.
    """

    per_feature = True

    @dataclass
    class Config(Part.Config):
        rank: int = number(16, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2 [rank, N F]."""
        divisor: float = number(16.0, above=0)
        """Of the log of the sigmoid: larger remembers longer."""
        bias: float = number(0.0, least=-1000, most=1000)
        """b at the start; larger remembers longer."""

    def __init__(self, config: Config, shape: LayerShape, feature_dim: int) -> None:
        super().__init__(config, shape, feature_dim)
        self.config, self.feature_dim = config, feature_dim
        self.down = nn.Parameter(torch.empty(shape.hidden_dim(), config.rank))
        self.up = nn.Parameter(torch.empty(config.rank, shape.kv_heads, feature_dim))
        self.bias = nn.Parameter(torch.empty(shape.kv_heads, feature_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down, std=0.006)
        nn.init.normal_(self.up, std=0.006)
        fill(self.bias, self.config.bias)

    def at(self, rate: Tensor) -> dict[str, Tensor]:
        """In all features of a head."""
        return {"bias": sigmoid_logit(rate, self.config.divisor)[:, None].expand_as(self.bias)}

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        assert hidden is not None
        narrow = hidden @ self.down.to(hidden.dtype)
        logits = wide(torch.einsum("btr,rnf->btnf", narrow, self.up.to(hidden.dtype)))
        return log_sigmoid(logits + self.bias.to(logits.dtype), self.config.divisor)
