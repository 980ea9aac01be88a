"""A head's one decay for all tokens (RetNet, Sun et al. 2023, arXiv 2307.08621; SUPRA, arXiv 2405.06640)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, accumulator, fill
from linearize.mixers.gate import GATES, Gate
from linearize.mixers.options import choice_problems


@GATES.register("fixed")
class FixedGate(Gate):
    """decay_h = 1 - 2^(-5 - h) (``retnet``), or exp(-2^(-8 (h + 1) / H)) (``alibi``, SUPRA's and Lightning's slopes).

    Without parameters, unless ``learned`` makes each head's rate one, which begins there. Decays differ between query
    heads, so the state is kept per query head, unless `per` says otherwise.

    Limitations: RetNet's slopes are closer to one (0.969 and up), ALiBi's reach back some 256 tokens at most. Where H
    is no power of two, ALiBi's code interleaves the slopes of two that are; here they are the formula's.
    """

    uses_hidden = False
    log_rate: nn.Parameter | None

    @dataclass
    class Config(Part.Config):
        slopes: str = "retnet"
        """retnet or alibi."""
        per: str = "query_head"
        """Slopes of the query heads, or of the kv_heads, whose query heads then share one state."""
        learned: bool = False
        """The log of each head's rate is a parameter, which a calibration sets and stages train."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(
                slopes=(self.slopes, ("retnet", "alibi")), per=(self.per, ("query_head", "kv_head"))
            )

    def __init__(self, config: Config, shape: LayerShape, feature_dim: int) -> None:
        super().__init__(config, shape, feature_dim)
        self.heads = shape.heads if config.per == "query_head" else shape.kv_heads
        self.first, self.among = 0, self.heads
        self.slopes = config.slopes
        rate = nn.Parameter(torch.empty(self.heads)) if config.learned else None
        self.register_parameter("log_rate", rate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.log_rate is not None:
            fill(self.log_rate, (-self._published(torch.device("cpu"))).log().to(self.log_rate))

    def take(self, whole: Part, rank: int, ranks: int) -> None:
        assert isinstance(whole, FixedGate)
        self.among = whole.among
        # several processes may hold the same head of keys
        self.first = whole.first + rank * (whole.heads // self.heads) // ranks * self.heads

    def at(self, rate: Tensor) -> dict[str, Tensor]:
        return {} if self.log_rate is None else {"log_rate": rate.log()}

    def forward(self, hidden: Tensor | None, k: Tensor) -> Tensor:
        dtype = accumulator(k.dtype)
        if self.log_rate is not None:
            return -self.log_rate.to(dtype).exp().expand(*k.shape[:2], self.heads)
        return self._published(k.device).to(dtype).expand(*k.shape[:2], self.heads)

    def _published(self, device: torch.device) -> Tensor:
        """[H] log decays, float64."""
        # computed per call in float64: a buffer would be cast to the model's dtype, where 1 - 2^-9 is 1
        heads = torch.arange(self.first, self.first + self.heads, dtype=torch.float64, device=device)
        if self.slopes == "retnet":
            return torch.log1p(-torch.exp2(-5.0 - heads))
        return -torch.exp(-8.0 * math.log(2) * (heads + 1) / self.among)
