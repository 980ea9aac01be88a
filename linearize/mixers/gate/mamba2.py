"""Mamba-2's decay (Dao & Gu 2024, arXiv 2405.21060, section 2), which Gated DeltaNet shares (arXiv 2412.06464)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import LayerShape, Part, fill, product
from linearize.mixers.gate import GATES, Gate
from linearize.mixers.options import number


@GATES.register("mamba2")
class Mamba2Gate(Gate):
    """log decay = -exp(A_log) * dt with dt = softplus(x W + dt_bias), per query head.

    The published layers draw A from U(0, 16) and dt from a log-uniform in [1e-3, 0.1], which spreads half-lives from
    less than one token to thousands, for a model trained from scratch. Here both are spread evenly over the heads
    between `fastest` and `slowest` half-lives, deterministic and near a teacher that forgets nothing.

    Limitations: Mamba-2 also scales its input by dt, which shrinks what the copied values contribute to a few percent;
    that factor is left out, as in Gated DeltaNet.
    """

    @dataclass
    class Config(Part.Config):
        fastest: float = number(16.0, above=0, most=1e9)
        """Half-life of the fastest head at the start, in tokens."""
        slowest: float = number(1024.0, above=0, most=1e9)
        """Half-life of the slowest head at the start, in tokens."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            if self.fastest <= self.slowest:
                return []
            return [f"fastest: {self.fastest} must be at most slowest ({self.slowest})"]

    def __init__(self, config: Config, shape: LayerShape, feature_dim: int) -> None:
        super().__init__(config, shape, feature_dim)
        self.heads = shape.heads
        self.config = config
        self.weight = nn.Parameter(torch.empty(shape.hidden_dim(), shape.heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.heads))
        self.a_log = nn.Parameter(torch.empty(shape.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self.weight, 0.0)
        steps = torch.linspace(0, 1, self.heads, dtype=torch.float64)
        slow, fast = math.log(self.config.slowest), math.log(self.config.fastest)
        rate = math.log(2) / torch.exp(slow + (fast - slow) * steps)
        dt = 0.05
        fill(self.dt_bias, math.log(math.expm1(dt)))
        fill(self.a_log, (rate / dt).log().to(self.a_log))

    def at(self, rate: Tensor) -> dict[str, Tensor]:
        """At the dt of the start."""
        return {"a_log": (rate / F.softplus(self.dt_bias)).log()}

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        assert hidden is not None
        logits = product(hidden, self.weight)
        dt = F.softplus(logits + self.dt_bias.to(logits.dtype))
        return -self.a_log.to(dt.dtype).exp() * dt
