"""The delta rule, plain (DeltaNet, arXiv 2406.06484) or gated (Gated DeltaNet, 2412.06464; Kimi Linear, 2510.26692)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.kernels.gated_delta import delta_chunk, delta_reference, delta_step
from linearize.mixers.base import LayerShape, Part, Partial, fill, product, put, running, wide
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.statistics import STRENGTHS, Statistics
from linearize.mixers.update import UPDATES, Stream, Transition
from linearize.mixers.update.shared import Overwriting, overwritten
from linearize.mixers.update.start import kept_since


@UPDATES.register("delta")
class Delta(Overwriting):
    """S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    Keys and queries are brought to length one. beta = sigmoid(x W + b) per head of the state. Without a gate a = 1
    (DeltaNet), with a gate per head Gated DeltaNet, with one per feature Kimi Delta Attention. The scale is learned per
    query head: a state that holds values under keys of length one answers with a fraction of a value, of a size that
    no copied weight makes up for. ``bias: false, rescales: false`` is the rule as published, whose layers have a norm
    behind it.
    """

    decays = ("none", "head", "feature")
    steps: int = 1
    """Of the rule for each token."""
    keeps: ClassVar[bool] = True
    """Whether backward finds what the kernel worked out on its way, or works it out again."""
    beta_bias: Tensor | None

    @dataclass
    class Config(Part.Config):
        beta_bias: float = number(0.0, least=-1000, most=1000)
        """b at the start: 0 writes with a strength of one half."""
        scale: float = number(1.0, above=0)
        """Scale of the output at the start."""
        bias: bool = True
        """Whether there is a b."""
        rescales: bool = True
        """Whether the scale is learned; false: 1 / sqrt(F)."""
        start: bool = False
        """Every text begins with a learned state, zero at the start."""

    def make(self, shape: LayerShape) -> None:
        self.rescales = self.config.rescales
        self.beta_weight = nn.Parameter(torch.empty(shape.hidden_dim(), self.heads))
        self.register_parameter("beta_bias", self.bias(self.heads))
        super().make(shape)

    def bias(self, *size: int) -> nn.Parameter | None:
        """The parameter b, or None where the config has none."""
        return nn.Parameter(torch.empty(*size)) if self.config.bias else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill(self.beta_weight, 0.0)
        if self.beta_bias is not None:
            fill(self.beta_bias, self.config.beta_bias)

    def calibrate(self, statistics: Statistics) -> None:
        """The strength of writing from the entropy of the teacher's attention, a mean over the heads that share it."""
        if self.beta_bias is not None:
            put(self.beta_bias, statistics.shared(statistics.strength, self.heads).logit())

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        if self.beta_bias is None:
            return []
        return [
            {"beta_bias": torch.full_like(self.beta_bias, math.log(share / (1 - share)))}
            for share in STRENGTHS
        ]

    def parallel(self, stream: Stream) -> Partial:
        stream, q, k, beta = self._terms(stream)
        left = (
            None
            if stream.log_decay is None or self.learned is None
            else running(stream.log_decay, stream.docs)
        )
        stream = self._below(stream, k, left)
        empty = k.new_zeros(k.shape[0], self.heads, self.feature_dim, stream.v.shape[-1])
        out, _ = delta_reference(q, k, stream.v, beta, stream.log_decay, stream.docs, empty)
        return self._above(out, stream, q, left)

    def chunked(self, stream: Stream, state: State) -> Partial:
        stream, q, k, beta = self._terms(stream)
        left = None if self.learned is None else kept_since(stream.log_decay, stream.docs, state)
        stream = self._below(stream, k, left)
        with self.form():
            narrow_q, narrow_k, v = stream.narrow(q, k, stream.v)
            out, sums = delta_chunk(
                narrow_q, narrow_k, v, beta, stream.decays(), stream.docs, state["sums"], keeps=self.keeps
            )
        state.write({"sums": sums})
        return self._above(out, stream, q, left)

    def transits(self) -> bool:
        return type(self).chunked is Delta.chunked and self.learned is None

    def transition(self, stream: Stream) -> Transition:
        """The rule run twice more: from nothing, and from the identity with nothing to write."""
        stream, _, k, beta = self._terms(stream)
        narrow_k, v = stream.narrow(k, stream.v)

        def end(values: Tensor, start: Tensor) -> Tensor:
            with self.form():
                return delta_chunk(narrow_k, narrow_k, values, beta, stream.decays(), stream.docs, start)[1]

        return overwritten(end, v, self.initial(len(k), wide(k).dtype, k.device)["sums"])

    def step(self, stream: Stream, state: State) -> Partial:
        stream, q, k, beta = self._terms(stream)
        left = None if self.learned is None else kept_since(stream.log_decay, stream.docs, state)
        stream = self._below(stream, k, left)
        with self.form():
            for i in range(self.steps):
                decay = None if stream.log_decay is None else stream.log_decay[:, i]
                out = delta_step(q[:, i], k[:, i], stream.v[:, i], beta[:, i], decay, state["sums"])
        return self._above(out[:, None], stream, q, left)

    def _below(self, stream: Stream, k: Tensor, left: Tensor | None) -> Stream:
        """With values less what a learned start holds under their keys; see `start.LearnedStart`."""
        if self.learned is None or stream.weights:
            return stream
        (low,) = stream.narrow(k)
        return replace(stream, v=stream.v - self.learned.read(low, left).numerator)

    def _above(self, out: Tensor, stream: Stream, q: Tensor, left: Tensor | None) -> Partial:
        """After the last step of each token, with what a learned start answers."""

        def last(x: Tensor) -> Tensor:
            return x if x.shape[1] == 1 else x[:, self.steps - 1 :: self.steps]

        made = Partial(last(out), None)
        if self.learned is None:
            return made
        (low,) = stream.narrow(last(q))
        return self.learned.added(made, low, None if left is None else last(left), weights=stream.weights)

    def _terms(self, stream: Stream) -> tuple[Stream, Tensor, Tensor, Tensor]:
        """The stream, q, k and beta as the kernel takes them: `steps` in the place of each token."""
        assert stream.hidden is not None
        dtype = stream.k.dtype
        logits = product(stream.hidden, self.beta_weight)
        beta = self._biased(logits).sigmoid() * stream.valid[..., None].to(dtype)
        return stream, self._query(stream), F.normalize(stream.k, dim=-1), beta

    def _query(self, stream: Stream) -> Tensor:
        return self.scaled(F.normalize(stream.q, dim=-1))

    def _biased(self, logits: Tensor) -> Tensor:
        return logits if self.beta_bias is None else logits + self.beta_bias.to(logits.dtype)
