"""RWKV-7's generalized delta rule (Peng et al. 2025, arXiv 2503.14456), and RADLADS' form of it (arXiv 2505.03005)."""

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
from linearize.mixers.base import LayerShape, Part, Partial, fill, put
from linearize.mixers.low_rank import LowRank
from linearize.mixers.options import WIDEST, number
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream, Update

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""q [B, T, H, F], k [B, T, M, F], v [B, T, M, V], and a, b, log decay [B, T, M, F], as the kernel names them."""


@UPDATES.register("rwkv7")
class RWKV7(Update):
    """S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T, o_t = scale S_t^T q_t.

    (The papers write the transpose.) What the state holds under kappa, of length one, is taken out at the in-context
    learning rate a = sigmoid(base + x W1 W2), per head and feature, one half at the start. RADLADS' ``balanced`` form
    removes under the key itself, kappa = k / |k|, and writes k~ = (1 - w + a) * k, so that a norm behind the mixer can
    go; RWKV-7's own (ARWKV keeps it) has kappa = normalize(k_k * k) and k~ = (1 + (a - 1) * k_a) * k, with learned k_k
    and k_a.

    The scale is learned per query head; in the papers it is one, and the query projection has to find it. A teacher's
    scores are sharpened by its softmax and act in full here: at one, the untrained layers of SmolLM2-135M give outputs
    some 25 times too large, at 0.03 of the right size, and they end nearer the teacher after as many steps.

    Limitations: published layers mix their values with the first layer's (value residual), which a layer on its own
    cannot do; the bonus r_k, zero at the start of conversions, and token shift are left out.
    """

    decays = ("feature",)
    sums_weights = False
    uses_hidden = True

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

    removal: Tensor | None
    share: Tensor | None

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
        self.rate = LowRank(shape.hidden_dim(), config.rank, heads, feature_dim, tanh=False)
        for name in ("removal", "share"):
            weight = None if config.balanced else nn.Parameter(torch.empty(heads, feature_dim))
            self.register_parameter(name, weight)
        self.scale = nn.Parameter(torch.empty(shape.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.rate.start(self.config.rate_base)
        if self.removal is not None:
            fill(self.removal, self.config.removal_scale)
        if self.share is not None:
            fill(self.share, self.config.rate_share)
        fill(self.scale, self.config.scale)

    def resize(self, factor: Tensor) -> bool:
        put(self.scale, self.scale * factor)
        return True

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        size = (batch, self.heads, self.feature_dim, self.value_dim)
        return {"sums": torch.zeros(size, dtype=dtype, device=device)}

    def parallel(self, stream: Stream) -> Partial:
        empty = stream.k.new_zeros(stream.k.shape[0], self.heads, self.feature_dim, stream.v.shape[-1])
        return Partial(generalized_delta_reference(*self._terms(stream), stream.docs, empty)[0], None)

    def chunked(self, stream: Stream, state: State) -> Partial:
        q, k, v, a, b, log_decay = self._terms(stream)
        with self.form():
            q, k, v, a, b = stream.narrow(q, k, v, a, b)
            out, sums = generalized_delta_chunk(q, k, v, a, b, log_decay, stream.docs, state["sums"])
        state.write({"sums": sums})
        return Partial(out.to(stream.q.dtype), None)

    def step(self, stream: Stream, state: State) -> Partial:
        q, k, v, a, b, log_decay = (x[:, 0] for x in self._terms(stream))
        with self.form():
            return Partial(generalized_delta_step(q, k, v, a, b, log_decay, state["sums"])[:, None], None)

    def _terms(self, stream: Stream) -> Terms:
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
        q = stream.q * self.scale.to(dtype)[:, None]
        return q, written, stream.v, -kappa, kappa * rate, stream.log_decay
