"""RWKV-7's generalized delta rule (Peng et al. 2025, arXiv 2503.14456), and RADLADS' form of it (arXiv 2505.03005)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import LayerShape, Part, fill
from linearize.mixers.low_rank import LowRank
from linearize.mixers.options import WIDEST, number
from linearize.mixers.shift import ShiftedProjections
from linearize.mixers.statistics import STRENGTHS, Statistics
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.first_values import FirstValues
from linearize.mixers.update.shared import Moving, Terms


@UPDATES.register("rwkv7")
class RWKV7(Moving):
    """S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T, o_t = scale S_t^T q_t.

    (The papers write the transpose.) What the state holds under kappa, of length one, is taken out at the in-context
    learning rate a = sigmoid(base + x W1 W2), per head and feature, one half at the start. RADLADS' ``balanced`` form
    removes under the key itself, kappa = k / |k|, and writes k~ = (1 - w + a) * k, so that a norm behind the mixer can
    go; RWKV-7's own (ARWKV keeps it) has kappa = normalize(k_k * k) and k~ = (1 + (a - 1) * k_a) * k, with learned k_k
    and k_a.

    The scale is learned per query head; in the papers it is one, and the query projection has to find it. A teacher's
    scores are sharpened by its softmax and act in full here: at one, the untrained layers of SmolLM2-135M give outputs
    some 25 times too large, at 0.03 of the right size, and they end nearer the teacher after as many steps.

    With `first_values` a layer's values are mixed with those of the model's first converted layer (`FirstValues`), as
    published layers do with layer 0's.

    Token shift is an option of each that reads the hidden state: rates (`shift` here), decays (`shift` of the gate),
    the output (`shift` of its gate), and the teacher's projections to queries, keys and values (`shift_projections`),
    each with a mix of its own as published. All start at zero, where nothing is shifted.

    Limitations: the bonus r_k, zero at the start of conversions, is left out.
    """

    @dataclass
    class Config(Part.Config):
        balanced: bool = True
        """RADLADS' keys; false: RWKV-7's."""
        rank: int = number(64, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2 [rank, M F]."""
        rate_base: float = number(0.0, least=-1000, most=1000)
        """Base of a's logit at the start: 0 takes out one half."""
        removal_scale: float = number(0.85, above=0)
        """k_k at the start, where not balanced; only its direction matters."""
        rate_share: float = number(1.0, least=-1000, most=1000)
        """k_a at the start, where not balanced: 0 writes the whole key, 1 writes a of it."""
        scale: float = number(0.03, above=0)
        """Scale of the output at the start; 1 as published."""
        start: bool = False
        """Every text begins with a learned state, zero at the start; the rule takes twice as long with it."""
        shift: bool = False
        """Token shift: x + mix (x_before - x) into W1, mix learned for each dim of x and zero at the start."""
        shift_projections: bool = False
        """Token shift in front of the projections to queries, keys and values, which are then run once for each."""
        first_values: bool = False
        """Values mixed with the first converted layer's."""
        first_rank: int = number(32, least=1, most=WIDEST)
        """Width of the low-rank part of the mixture's gate."""
        first_base: float = number(1.0, least=-1000, most=1000)
        """The gate's logit at the start; 1 as published, 73 % of the first layer's values."""

    removal: Tensor | None
    share: Tensor | None

    def make(self, shape: LayerShape) -> None:
        self.rate = LowRank(shape.hidden_dim(), self.config.rank, self.heads, self.feature_dim, tanh=False)
        self.register_parameter(
            "mix", nn.Parameter(torch.empty(shape.hidden_dim())) if self.config.shift else None
        )
        if self.config.shift_projections:
            self.inputs = ShiftedProjections(shape.hidden_dim())
        if self.config.first_values:
            self.first = FirstValues(shape, self.config.first_rank, self.config.first_base)
        for name in ("removal", "share"):
            weight = None if self.config.balanced else nn.Parameter(torch.empty(self.heads, self.feature_dim))
            self.register_parameter(name, weight)
        super().make(shape)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.rate.start(self.config.rate_base)
        if self.mix is not None:
            fill(self.mix, 0.0)
        if self.inputs is not None:
            self.inputs.start()
        if self.first is not None:
            self.first.start()
        if self.removal is not None:
            fill(self.removal, self.config.removal_scale)
        if self.share is not None:
            fill(self.share, self.config.rate_share)

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        base = self.rate.base
        return [{"rate.base": torch.full_like(base, math.log(x / (1 - x)))} for x in STRENGTHS]

    def terms(self, stream: Stream) -> Terms:
        assert stream.hidden is not None and stream.log_decay is not None
        k, dtype = stream.k, stream.k.dtype
        rate = self.rate(stream.hidden).sigmoid()
        if self.removal is None or self.share is None:
            kappa = F.normalize(k, dim=-1)
            written = k * (rate - stream.log_decay.expm1())
        else:
            kappa = F.normalize(k * self.removal.to(dtype), dim=-1)
            written = k * (1 + (rate - 1) * self.share.to(dtype))
        # the key of a token that nobody may see is zero, and so are kappa and what is written
        return self.scaled(stream.q), written, stream.v, -kappa, kappa * rate, stream.log_decay
