"""The delta rule with an erase and a write gate (Gated DeltaNet-2, Hatamizadeh et al. 2026, arXiv 2605.22791)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import LayerShape, Part, fill, put, wide
from linearize.mixers.options import number
from linearize.mixers.statistics import STRENGTHS, Statistics
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.shared import Moving, Terms


@UPDATES.register("gdn2")
class GatedDelta2(Moving):
    """S_t = (I - k_t (e_t * k_t)^T) diag(a_t) S_{t-1} + k_t (w_t * v_t)^T, o_t = scale S_t^T q_t.

    Keys and queries are brought to length one. What is erased follows e = sigmoid(x E + b_e), per head and key dim,
    what is written w = sigmoid(x W + b_w), per head and value dim. E = W = 0 at the start, where the rule is Kimi Delta
    Attention's with beta = 1/2; e and w of one number for all dims keep it there. The scale is that of `delta`.
    """

    @dataclass
    class Config(Part.Config):
        erase_bias: float = number(0.0, least=-1000, most=1000)
        """b_e at the start: 0 erases one half."""
        write_bias: float = number(0.0, least=-1000, most=1000)
        """b_w at the start: 0 writes one half."""
        scale: float = number(1.0, above=0)
        """Scale of the output at the start."""
        start: bool = False
        """Every text begins with a learned state, zero at the start."""

    takes_under_key: ClassVar[bool] = True

    def make(self, shape: LayerShape) -> None:
        self.erase_weight = nn.Parameter(torch.empty(shape.hidden_dim(), self.heads, self.feature_dim))
        self.erase_bias = nn.Parameter(torch.empty(self.heads, self.feature_dim))
        self.write_weight = nn.Parameter(torch.empty(shape.hidden_dim(), self.heads, self.value_dim))
        self.write_bias = nn.Parameter(torch.empty(self.heads, self.value_dim))
        super().make(shape)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill(self.erase_weight, 0.0)
        fill(self.write_weight, 0.0)
        fill(self.erase_bias, self.config.erase_bias)
        fill(self.write_bias, self.config.write_bias)

    def calibrate(self, statistics: Statistics) -> None:
        """What is erased and written as `delta` has its one strength: from the entropy of the teacher's attention."""
        logit = statistics.shared(statistics.strength, self.heads).logit()[:, None]
        put(self.erase_bias, logit.expand_as(self.erase_bias))
        put(self.write_bias, logit.expand_as(self.write_bias))

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        logits = [math.log(share / (1 - share)) for share in STRENGTHS]
        biases = {"erase_bias": self.erase_bias, "write_bias": self.write_bias}
        return [{name: torch.full_like(bias, logit) for name, bias in biases.items()} for logit in logits]

    def terms(self, stream: Stream) -> Terms:
        assert stream.log_decay is not None
        # the key of a token that nobody may see is zero, and so is all that it would do
        k = F.normalize(stream.k, dim=-1)
        erased = k * self._gate(stream, self.erase_weight, self.erase_bias)
        write = self._gate(stream, self.write_weight, self.write_bias)
        # weights have no value dims: what is written of a column of the identity is their mean
        written = stream.v * (write.mean(-1, keepdim=True) if stream.weights else write)
        q = self.scaled(F.normalize(stream.q, dim=-1))
        # the kernel reads the state before it decays
        return q, k, written, erased * stream.log_decay.exp(), -k, stream.log_decay

    @staticmethod
    def _gate(stream: Stream, weight: Tensor, bias: Tensor) -> Tensor:
        assert stream.hidden is not None
        logits = wide(torch.einsum("btd,dmf->btmf", stream.hidden, weight.to(stream.hidden.dtype)))
        return (logits + bias.to(logits.dtype)).sigmoid()
