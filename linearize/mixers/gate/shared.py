"""What the gates of RWKV share: decay logits that start on a curve over the channels and follow the hidden state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, fill
from linearize.mixers.gate import Gate
from linearize.mixers.low_rank import LowRank
from linearize.mixers.options import WIDEST, choice_problems, number
from linearize.mixers.statistics import Statistics

SPREAD = 4.0
"""Times slower and faster than its head's own rate that the ends of a head's channels are calibrated to forget."""


def spread(rate: Tensor, channels: int) -> Tensor:
    """Rates [M] -> [M, channels], evenly on a logarithmic scale from SPREAD times slower to faster; [M, 1]: alike."""
    if rate.dim() == 2:
        return rate.expand(-1, channels)
    place = torch.linspace(-1, 1, channels, dtype=rate.dtype, device=rate.device)
    return rate[:, None] * SPREAD**place


def curves(gate: Gate, statistics: Statistics) -> list[dict[str, Tensor]]:
    """Decays of every reach for `Part.starts`: a head's channels spread around its own, and all alike."""
    ladder = statistics.ladder(gate.rates)
    return [gate.at(rate) for rate in (*ladder, *(rate[:, None] for rate in ladder))]


class CurveGate(Gate):
    """d = base + tanh(x W1) W2 per head and feature; what becomes of d is the subclass's.

    base_n = slow + (fast - slow) (n / (M F - 1))^exponent over the M F channels of a layer, in the order of its heads:
    the first head remembers longest, the last one least. W1 = 0, so every token starts on that curve.

    Limitations: the published exponents grow with depth; here one `exponent`, by default that of the middle layer,
    serves every layer. Published models mix each token with the one before it on the way into W1; RADLADS gains nothing
    from that with RWKV-7 and little with RWKV-6, and it is off unless `shift` asks for it.
    """

    per_feature = True

    @dataclass
    class Config(Part.Config):
        slow: float = number(0.0, least=-100, most=100)
        """d of the first channel at the start; the smaller, the longer it remembers."""
        fast: float = number(0.0, least=-100, most=100)
        """d of the last channel at the start; lower it to start nearer the teacher, which forgets nothing."""
        exponent: float = number(1.0, above=0, most=100)
        """How the curve bends in between: the larger, the more channels remember long."""
        rank: int = number(64, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2 [rank, M F]."""
        per: str = "kv_head"
        """Decays per kv_head, whose query heads then share one state, or per query_head as published."""
        shift: bool = False
        """Token shift: x + mix (x_before - x) into W1, mix learned for each dim of x and zero at the start."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            found = choice_problems(per=(self.per, ("kv_head", "query_head")))
            if self.slow > self.fast:
                found.append(f"slow: {self.slow} must be at most fast ({self.fast})")
            return found

    def __init__(self, config: Config, shape: LayerShape, feature_dim: int) -> None:
        super().__init__(config, shape, feature_dim)
        self.config = config
        self.heads = shape.heads if config.per == "query_head" else shape.kv_heads
        self.logits = LowRank(shape.hidden_dim(), config.rank, self.heads, feature_dim, tanh=True)
        self.register_parameter(
            "mix", nn.Parameter(torch.empty(shape.hidden_dim())) if config.shift else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.mix is not None:
            fill(self.mix, 0.0)
        base = self.logits.base
        place = torch.linspace(0, 1, base.numel(), dtype=torch.float64) ** self.config.exponent
        curve = self.config.slow + (self.config.fast - self.config.slow) * place
        self.logits.start(curve.view(base.shape).to(base))

    def at(self, rate: Tensor) -> dict[str, Tensor]:
        """Decays SPREAD times slower to faster than `rate` along a head; of rates [M, 1] alike."""
        return {"logits.base": self.logit(spread(rate, self.logits.base.shape[1]))}

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        return curves(self, statistics)

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        assert hidden is not None
        return self.log_decay(self.logits(hidden))

    def log_decay(self, logits: Tensor) -> Tensor:
        """d -> log decay, both [B, T, M, F]."""
        raise NotImplementedError(type(self))  # pragma: no cover - every subclass defines it

    def logit(self, rate: Tensor) -> Tensor:
        """The inverse of `log_decay`: rates = -log decay > 0 -> d, within what the curve reaches."""
        raise NotImplementedError(type(self))  # pragma: no cover - every subclass defines it
