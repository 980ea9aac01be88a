"""RWKV-7's decay (Peng et al. 2025, arXiv 2503.14456), which RADLADS and ARWKV keep (arXiv 2505.03005, 2501.15570)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.gate import GATES
from linearize.mixers.gate.shared import CurveGate
from linearize.mixers.options import number


@GATES.register("rwkv7")
class RWKV7Gate(CurveGate):
    """log decay = -exp(-1/2) sigmoid(d), per head and feature; d = base + tanh(x W1) W2 (see `CurveGate`).

    No token keeps less than exp(-exp(-1/2)) = 0.545. The published curve of d from -6.5 to -1.5 is a decay from 0.999
    to 0.895 a token, half-lives of 760 to 6.3 tokens; with ``fast: -4`` the fastest channel keeps half for 64.
    """

    @dataclass
    class Config(CurveGate.Config):
        slow: float = number(-6.5, least=-100, most=100)
        fast: float = number(-1.5, least=-100, most=100)
        exponent: float = number(1.56, above=0, most=100)
        """Published: 0.85 in the first layer to 1.85 in the last."""

    def log_decay(self, logits: Tensor) -> Tensor:
        return -math.exp(-0.5) * logits.sigmoid()

    def logit(self, rate: Tensor) -> Tensor:
        return (rate / math.exp(-0.5)).clamp(1e-6, 0.98).logit()
