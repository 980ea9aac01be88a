"""Gates of the recurrent branch: log decay <= 0 of the state at each token; one file each.

A decay is per head, [B, T, M], or per feature, [B, T, M, F]; M is `heads`, all query heads or the key-value heads.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.base import LayerShape, Part, put
from linearize.mixers.statistics import Statistics
from linearize.registry import Registry, discover


class Gate(Part):
    """Base of the gates.

    Args:
        config: the gate's options.
        shape: the layer's numbers.
        feature_dim: F of the feature map, for gates per feature.

    Attributes:
        per_feature: whether the decay has a feature dimension.
        uses_hidden: whether the gate reads the layer's input.
        heads: M of the decay.
        mix: [D], how much of the token before it reads in place of a token, or None for nothing (token shift).
    """

    per_feature: ClassVar[bool] = False
    uses_hidden: ClassVar[bool] = True
    heads: int
    mix: Tensor | None

    def __init__(self, config: Any, shape: LayerShape, feature_dim: int) -> None:
        super().__init__()
        self.heads = shape.kv_heads
        self.register_parameter("mix", None)

    @property
    def rates(self) -> int:
        """How many decays its parameters tell apart: a divisor of the query heads."""
        return self.heads

    def at(self, rate: Tensor) -> dict[str, Tensor]:
        """Values of its parameters under which a token keeps exp(-rate), rate [rates] > 0; {} where none says it."""
        return {}

    def calibrate(self, statistics: Statistics) -> None:
        """The decay from the teacher's attention distance, a mean over the heads that share it."""
        parameters = dict(self.named_parameters())
        for name, value in self.at(statistics.shared(statistics.rate, self.rates)).items():
            put(parameters[name], value)

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """Decays of every reach: most of a softmax's distant weight averages out, so that less often does better."""
        made = [self.at(rate) for rate in statistics.ladder(self.rates)]
        return [values for values in made if values]

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        """hidden [B, T, D], k [B, T, N, K] before its feature map -> log decay [B, T, M] or [B, T, M, F]."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered gate defines it


def log_sigmoid(logits: Tensor, divisor: float) -> Tensor:
    """log of sigmoid(logits) ** (1 / divisor): the larger the divisor, the slower the decay at the same logit."""
    return F.logsigmoid(logits) / divisor


def sigmoid_logit(rate: Tensor, divisor: float) -> Tensor:
    """The logits with `log_sigmoid` = -rate; rates are kept off zero, where the logit would be infinite."""
    return -torch.expm1((rate * divisor).clamp(1e-6, 80.0)).log()


GATES: Registry[Gate] = Registry("gate")
discover(sys.modules[__name__])
