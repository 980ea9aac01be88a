"""The delta rule with an erase and a write gate (Gated DeltaNet-2, Hatamizadeh et al. 2026, arXiv 2605.22791)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.kernels.generalized_delta import (
    generalized_delta_chunk,
    generalized_delta_reference,
    generalized_delta_step,
)
from linearize.mixers.base import LayerShape, Part, Partial, fill, put, wide
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.statistics import Statistics
from linearize.mixers.update import UPDATES, Stream, Update


@UPDATES.register("gdn2")
class GatedDelta2(Update):
    """S_t = (I - k_t (e_t * k_t)^T) diag(a_t) S_{t-1} + k_t (w_t * v_t)^T, o_t = scale S_t^T q_t.

    Keys and queries are brought to length one. What is erased follows e = sigmoid(x E + b_e), per head and key dim,
    what is written w = sigmoid(x W + b_w), per head and value dim. E = W = 0 at the start, where the rule is Kimi Delta
    Attention's with beta = 1/2; e and w of one number for all dims keep it there. The scale is that of `delta`.
    """

    decays = ("feature",)
    sums_weights = False
    uses_hidden = True

    @dataclass
    class Config(Part.Config):
        erase_bias: float = number(0.0, least=-1000, most=1000)
        """b_e at the start: 0 erases one half."""
        write_bias: float = number(0.0, least=-1000, most=1000)
        """b_w at the start: 0 writes one half."""
        scale: float = number(1.0, above=0)
        """Scale of the output at the start."""

    def __init__(
        self,
        config: Config,
        heads: int,
        feature_dim: int,
        value_dim: int,
        shape: LayerShape,
        running_sum: bool = True,
    ) -> None:
        super().__init__(config, heads, feature_dim, value_dim, shape, running_sum)
        self.config = config
        self.erase_weight = nn.Parameter(torch.empty(shape.hidden_dim(), heads, feature_dim))
        self.erase_bias = nn.Parameter(torch.empty(heads, feature_dim))
        self.write_weight = nn.Parameter(torch.empty(shape.hidden_dim(), heads, value_dim))
        self.write_bias = nn.Parameter(torch.empty(heads, value_dim))
        self.scale = nn.Parameter(torch.empty(shape.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self.erase_weight, 0.0)
        fill(self.write_weight, 0.0)
        fill(self.erase_bias, self.config.erase_bias)
        fill(self.write_bias, self.config.write_bias)
        fill(self.scale, self.config.scale)

    def calibrate(self, statistics: Statistics) -> None:
        """What is erased and written as `delta` has its one strength: from the entropy of the teacher's attention."""
        logit = statistics.shared(statistics.strength, self.heads).logit()[:, None]
        put(self.erase_bias, logit.expand_as(self.erase_bias))
        put(self.write_bias, logit.expand_as(self.write_bias))

    def resize(self, factor: Tensor) -> bool:
        put(self.scale, self.scale * factor)
        return True

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        size = (batch, self.heads, self.feature_dim, self.value_dim)
        return {"sums": torch.zeros(size, dtype=dtype, device=device)}

    def parallel(self, stream: Stream) -> Partial:
        return self._defined(stream, self._written(stream))

    def weights(self, stream: Stream) -> Partial:
        """As elsewhere where w is one number for all dims of a head; else what is written is their mean."""
        batch, tokens = stream.k.shape[:2]
        eye = torch.eye(tokens, dtype=stream.k.dtype, device=stream.k.device)
        share = self._gate(stream, self.write_weight, self.write_bias).mean(-1, keepdim=True)
        return self._defined(stream, (eye[:, None] * share).expand(batch, -1, self.heads, -1))

    def chunked(self, stream: Stream, state: State) -> Partial:
        q, k, a, b = self._terms(stream)
        assert stream.log_decay is not None
        with self.form():
            q, k, v, a, b = stream.narrow(q, k, self._written(stream), a, b)
            out, sums = generalized_delta_chunk(q, k, v, a, b, stream.log_decay, stream.docs, state["sums"])
        state.write({"sums": sums})
        return Partial(out.to(stream.q.dtype), None)

    def step(self, stream: Stream, state: State) -> Partial:
        assert stream.log_decay is not None
        q, k, a, b = (x[:, 0] for x in self._terms(stream))
        v, log_decay = self._written(stream)[:, 0], stream.log_decay[:, 0]
        with self.form():
            return Partial(generalized_delta_step(q, k, v, a, b, log_decay, state["sums"])[:, None], None)

    def _defined(self, stream: Stream, v: Tensor) -> Partial:
        q, k, a, b = self._terms(stream)
        assert stream.log_decay is not None
        empty = k.new_zeros(k.shape[0], self.heads, self.feature_dim, v.shape[-1])
        return Partial(
            generalized_delta_reference(q, k, v, a, b, stream.log_decay, stream.docs, empty)[0], None
        )

    def _terms(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [B, T, H, F], and k, a, b [B, T, M, F] as the kernel names them: it reads the state before it decays."""
        assert stream.log_decay is not None
        # the key of a token that nobody may see is zero, and so is all that it would do
        k = F.normalize(stream.k, dim=-1)
        erased = k * self._gate(stream, self.erase_weight, self.erase_bias)
        q = F.normalize(stream.q, dim=-1) * self.scale.to(k.dtype)[:, None]
        return q, k, erased * stream.log_decay.exp(), -k

    def _written(self, stream: Stream) -> Tensor:
        return stream.v * self._gate(stream, self.write_weight, self.write_bias)

    @staticmethod
    def _gate(stream: Stream, weight: Tensor, bias: Tensor) -> Tensor:
        assert stream.hidden is not None
        logits = wide(torch.einsum("btd,dmf->btmf", stream.hidden, weight.to(stream.hidden.dtype)))
        return (logits + bias.to(logits.dtype)).sigmoid()
