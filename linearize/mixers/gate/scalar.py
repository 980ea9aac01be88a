"""A scalar gate per position from the hidden state (Lizard, Nguyen et al. 2025, arXiv 2507.09025, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, fill, product
from linearize.mixers.gate import GATES, Gate, log_sigmoid, sigmoid_logit
from linearize.mixers.options import choice_problems, number


@GATES.register("scalar")
class ScalarGate(Gate):
    """log decay = logsigmoid(x w + b) / divisor, one value for all heads (``per: layer``), or one per head.

    Lizard writes sigmoid(W x) with one W [D, 1]; started at zero that halves the state at every token. b = 4 starts at
    0.982 instead (a half-life of 38 tokens), near the teacher, which forgets nothing; ``bias: 0`` is the paper's.
    """

    @dataclass
    class Config(Part.Config):
        per: str = "layer"
        """layer or kv_head."""
        divisor: float = number(1.0, above=0)
        """Of the log of the sigmoid: larger remembers longer."""
        bias: float = number(4.0, least=-1000, most=1000)
        """b at the start."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(per=(self.per, ("layer", "kv_head")))

    def __init__(self, config: Config, shape: LayerShape, feature_dim: int) -> None:
        super().__init__(config, shape, feature_dim)
        self.config = config
        width = 1 if config.per == "layer" else shape.kv_heads
        self.weight = nn.Parameter(torch.empty(shape.hidden_dim(), width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self.weight, 0.0)
        fill(self.bias, self.config.bias)

    @property
    def rates(self) -> int:
        return len(self.bias)

    def at(self, rate: Tensor) -> dict[str, Tensor]:
        return {"bias": sigmoid_logit(rate, self.config.divisor)}

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        assert hidden is not None
        logits = product(hidden, self.weight)
        logits = logits + self.bias.to(logits.dtype)
        return log_sigmoid(logits, self.config.divisor).expand(*k.shape[:2], self.heads)
