"""A denominator of any sign that cannot come near zero (xLSTM, Beck et al. 2024, arXiv 2405.04517, eq. 21)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.mixers.base import LayerShape, Part, Partial
from linearize.mixers.normalizer import NORMALIZERS, Normalizer
from linearize.mixers.options import number


@NORMALIZERS.register("bounded")
class Bounded(Normalizer):
    """y = sum w v / max(|sum w|, floor): signed weights divide by their sum where it is large, and add up elsewhere.

    Limitations: y has a kink where the sum passes the floor, and a negative sum turns its sign; a sum of that kind is
    no share that a window could be weighed against.
    """

    running_sum = True
    signed = True

    @dataclass
    class Config(Part.Config):
        floor: float = number(1.0, above=0)
        """Least denominator; 1 as published."""

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.floor = config.floor

    def forward(self, partial: Partial) -> Partial:
        assert partial.denominator is not None
        return Partial(partial.numerator, partial.denominator.abs().clamp_min(self.floor))
