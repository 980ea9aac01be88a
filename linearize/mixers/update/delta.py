"""The delta rule, plain (DeltaNet, arXiv 2406.06484) or gated (Gated DeltaNet, 2412.06464; Kimi Linear, 2510.26692)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.kernels.gated_delta import delta_chunk, delta_reference, delta_step
from linearize.mixers.base import LayerShape, Part, Partial, fill, product
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.shared import Overwriting


@UPDATES.register("delta")
class Delta(Overwriting):
    """S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    Keys and queries are brought to length one. beta = sigmoid(x W + b) per head of the state. Without a gate a = 1
    (DeltaNet), with a gate per head Gated DeltaNet, with one per feature Kimi Delta Attention. The scale is learned per
    query head: a state that holds values under keys of length one answers with a fraction of a value, of a size that
    no copied weight makes up for.
    """

    decays = ("none", "head", "feature")

    @dataclass
    class Config(Part.Config):
        beta_bias: float = number(0.0, least=-1000, most=1000)
        """b at the start: 0 writes with a strength of one half."""
        scale: float = number(1.0, above=0)
        """Scale of the output at the start."""

    def make(self, shape: LayerShape) -> None:
        self.beta_weight = nn.Parameter(torch.empty(shape.hidden_dim(), self.heads))
        self.beta_bias = nn.Parameter(torch.empty(self.heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill(self.beta_weight, 0.0)
        fill(self.beta_bias, self.config.beta_bias)

    def parallel(self, stream: Stream) -> Partial:
        q, k, beta = self._terms(stream)
        empty = k.new_zeros(k.shape[0], self.heads, self.feature_dim, stream.v.shape[-1])
        return Partial(delta_reference(q, k, stream.v, beta, stream.log_decay, stream.docs, empty)[0], None)

    def chunked(self, stream: Stream, state: State) -> Partial:
        q, k, beta = self._terms(stream)
        with self.form():
            q, k, v = stream.narrow(q, k, stream.v)
            out, sums = delta_chunk(q, k, v, beta, stream.log_decay, stream.docs, state["sums"])
        state.write({"sums": sums})
        return Partial(out, None)

    def step(self, stream: Stream, state: State) -> Partial:
        q, k, beta = (x[:, 0] for x in self._terms(stream))
        decay = None if stream.log_decay is None else stream.log_decay[:, 0]
        with self.form():
            return Partial(delta_step(q, k, stream.v[:, 0], beta, decay, state["sums"])[:, None], None)

    def _terms(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        assert stream.hidden is not None
        dtype = stream.k.dtype
        logits = product(stream.hidden, self.beta_weight) + self.beta_bias.to(dtype)
        beta = logits.sigmoid() * stream.valid[..., None].to(dtype)
        q = F.normalize(stream.q, dim=-1) * self.scale.to(dtype)[:, None]
        return q, F.normalize(stream.k, dim=-1), beta
