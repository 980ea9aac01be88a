"""Latent attention: every feature has a normalizer of its own (Latte, Dolga et al. 2024, arXiv 2402.17512)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from linearize.kernels.gated_linear import gated_linear_chunk, gated_linear_reference
from linearize.mixers.base import Partial, wide
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.additive import Additive

LEAST = 1e-9
"""Of a feature's sum: kernels multiply the query over it by later keys of a chunk too, before they mask them, and
exp(60), the largest feature, over it still fits float32. A feature whose keys add up to less counts for less."""


@UPDATES.register("latte")
class Latte(Additive):
    """o_t = sum_f p_t(f) sum_{s <= t} p(s | f) v_s, p_t(f) = q_tf / sum_g q_tg and p(s | f) = k_sf / sum_{r <= t} k_rf.

    A feature is a latent state between query and keys: the query chooses among F of them, each spreads over the tokens
    by itself. With the map `exp` both are softmaxes, as published. Rows of weights add up to one, so no normalizer
    stands behind; the sums of the keys' features are the state's second tensor.

    Limitations: no decay, under which the sums would have to be a recurrence of their own; the features of a query say
    nothing about which token it looks for beyond the latent's own preference.
    """

    decays: ClassVar[tuple[str, ...]] = ("none",)
    dense = False
    sums_weights = False
    positive = True
    takes_products: ClassVar[bool] = False

    @dataclass
    class Config(Additive.Config):
        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return (
                ["start: a learned start has no sum of its own features here; leave it out"]
                if self.start
                else []
            )

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        norms = torch.zeros(batch, self.heads, self.feature_dim, dtype=dtype, device=device)
        return super().initial(batch, dtype, device) | {"norms": norms}

    def parallel(self, stream: Stream) -> Partial:
        still, ones = stream.k.new_zeros(stream.k.shape[:3]), torch.ones_like(stream.k[..., :1])
        empty = stream.k.new_zeros(len(stream.k), self.heads, 1, self.feature_dim)
        given = (ones, ones, stream.k, still, stream.docs, (empty, None))
        total, _, _ = gated_linear_reference(*given, normalize=False)
        return super().parallel(replace(self._divided(stream, total), log_decay=still))

    def chunked(self, stream: Stream, state: State) -> Partial:
        # a sum over the text less what came before the document would leave little of a rare feature's digits
        ones = torch.ones_like(stream.k[..., :1])
        with self.form():
            q, k, v = stream.narrow(ones, ones, stream.k, grows=True)
            before = (state["norms"][:, :, None], None)
            total, _, (norms, _) = gated_linear_chunk(q, k, v, None, stream.docs, before, normalize=False)
        state.write({"norms": norms[:, :, 0]})
        return super().chunked(self._divided(stream, total), state)

    def step(self, stream: Stream, state: State) -> Partial:
        state["norms"].add_(stream.k[:, 0])
        return super().step(self._divided(stream, state["norms"][:, None]), state)

    def _divided(self, stream: Stream, total: Tensor) -> Stream:
        """With queries that add up to one, each feature over the sum of the keys' [B, T, M, F]."""
        q = stream.q / stream.q.sum(-1, keepdim=True)
        q = q.unflatten(2, (self.heads, -1)) / wide(total).clamp_min(LEAST)[:, :, :, None]
        return replace(stream, q=q.flatten(2, 3))
