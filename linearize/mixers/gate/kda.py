"""The decay of Kimi Delta Attention, one for every key dim (Kimi Team 2025, arXiv 2510.26692, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import LayerShape, Part, fill
from linearize.mixers.gate import GATES, Gate
from linearize.mixers.gate.shared import curves, spread
from linearize.mixers.low_rank import LowRank
from linearize.mixers.options import WIDEST, choice_problems, number
from linearize.mixers.statistics import Statistics


@GATES.register("kda")
class KDAGate(Gate):
    """log decay = -exp(a) softplus(d), d = base + x W1 W2 per head and feature, a per head.

    With ``lowest: L``, below zero, log decay = L sigmoid(exp(a) d) instead, as in later models with this layer: no
    token keeps less than exp(L), however d comes out.

    Published layers draw base so that softplus(base) is log-uniform in [1e-3, 0.1] and exp(a) from U(1, 16): half-lives
    from less than one token to some 700, for a model trained from scratch. Here a starts at zero and base so that
    half-lives are spread evenly, on a logarithmic scale, over the features of every head: deterministic, and near a
    teacher that forgets nothing. W1 = 0, so every token starts there.
    """

    per_feature = True

    @dataclass
    class Config(Part.Config):
        rank: int = number(64, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2 [rank, M F]; published: the head's width."""
        slowest: float = number(1024.0, above=0, most=1e9)
        """Half-life of each head's slowest feature at the start, in tokens."""
        fastest: float = number(16.0, above=0, most=1e9)
        """Half-life of each head's fastest feature at the start, in tokens."""
        lowest: float = number(0.0, least=-1000, most=0)
        """Bound under the log decay of a token, such as -5; 0 is none."""
        per: str = "kv_head"
        """Decays per kv_head, whose query heads then share one state, or per query_head as published."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            found = choice_problems(per=(self.per, ("kv_head", "query_head")))
            if self.fastest > self.slowest:
                found.append(f"fastest: {self.fastest} must be at most slowest ({self.slowest})")
            if self.lowest and math.log(2) / self.fastest >= -self.lowest:
                found.append(
                    f"lowest: {self.lowest} is above the log decay of a half-life of {self.fastest} tokens, "
                    f"{-math.log(2) / self.fastest:.3g}; lower it, or give fastest more tokens"
                )
            return found

    def __init__(self, config: Config, shape: LayerShape, feature_dim: int) -> None:
        super().__init__(config, shape, feature_dim)
        self.config = config
        self.heads = shape.heads if config.per == "query_head" else shape.kv_heads
        self.logits = LowRank(shape.hidden_dim(), config.rank, self.heads, feature_dim, tanh=False)
        self.a_log = nn.Parameter(torch.empty(self.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        base = self.logits.base
        slow, fast = math.log(self.config.slowest), math.log(self.config.fastest)
        place = torch.linspace(0, 1, base.shape[-1], dtype=torch.float64)
        rate = math.log(2) / torch.exp(slow + (fast - slow) * place)
        self.logits.start(self._base(rate).to(base))
        fill(self.a_log, 0.0)

    def _base(self, rate: Tensor) -> Tensor:
        """The base under which a token forgets at `rate`, a log decay above zero, while a is zero."""
        if self.config.lowest:
            return (rate / -self.config.lowest).clamp(1e-6, 0.98).logit()
        return rate.expm1().log()

    def at(self, rate: Tensor) -> dict[str, Tensor]:
        """As `CurveGate.at`."""
        return {"logits.base": self._base(spread(rate, self.logits.base.shape[-1]))}

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        return curves(self, statistics)

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        assert hidden is not None
        d = self.logits(hidden)
        factor = self.a_log.to(d.dtype).exp()[:, None]
        if self.config.lowest:
            return self.config.lowest * (factor * d).sigmoid()
        return -factor * F.softplus(d)
