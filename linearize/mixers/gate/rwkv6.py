"""RWKV-6's decay (Peng et al. 2024, arXiv 2404.05892) as RADLADS has it (Goldstein et al. 2025, arXiv 2505.03005)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.gate import GATES
from linearize.mixers.gate.shared import CurveGate
from linearize.mixers.options import number


@GATES.register("rwkv6")
class RWKV6Gate(CurveGate):
    """log decay = max(-exp(d), -5), per head and feature; d = base + tanh(x W1) W2 (see `CurveGate`).

    The published curve of d from -6 to -1 is a decay from 0.998 to 0.69 a token, half-lives of 280 to 1.9 tokens; with
    ``fast: -4`` the fastest channel keeps half for 38.
    """

    LOWEST = -5.0

    @dataclass
    class Config(CurveGate.Config):
        slow: float = number(-6.0, least=-100, most=100)
        fast: float = number(-1.0, least=-100, most=100)
        exponent: float = number(1.35, above=0, most=100)
        """Published: 0.7 in the first layer to 2 in the last."""

    def log_decay(self, logits: Tensor) -> Tensor:
        return (-logits.exp()).clamp(min=self.LOWEST)

    def logit(self, rate: Tensor) -> Tensor:
        return rate.clamp(1e-6, -self.LOWEST).log()
