"""What the rules share that take something out of one matrix before they write into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.kernels.generalized_delta import (
    generalized_delta_chunk,
    generalized_delta_reference,
    generalized_delta_step,
)
from linearize.mixers.base import LayerShape, Partial, fill, put
from linearize.mixers.state import State
from linearize.mixers.update import Stream, Update

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""q [B, T, H, F], k [B, T, M, F], v [B, T, M, V], and a, b, log decay [B, T, M, F], as `generalized_delta` names
them."""


class Overwriting(Update):
    """Base of the delta rules: the state is one matrix [F, V] a head, and a learned scale per query head stands on it.

    Arguments are those of `Update`; the config has a `scale`, where that starts.

    Attributes:
        rescales: whether there is that scale; `make` may say no.
    """

    sums_weights = False
    uses_hidden = True
    rescales = True
    scale: Tensor | None

    def __init__(
        self,
        config: Any,
        heads: int,
        feature_dim: int,
        value_dim: int,
        shape: LayerShape,
        running_sum: bool = True,
    ) -> None:
        super().__init__(config, heads, feature_dim, value_dim, shape, running_sum)
        self.config = config
        self.make(shape)
        scale = nn.Parameter(torch.empty(shape.heads)) if self.rescales else None
        self.register_parameter("scale", scale)
        self.reset_parameters()

    def make(self, shape: LayerShape) -> None:
        """The rule's own parameters, before the scale and without values."""
        raise NotImplementedError(type(self))  # pragma: no cover - every rule defines it

    def reset_parameters(self) -> None:
        if self.scale is not None:
            fill(self.scale, self.config.scale)

    def resize(self, factor: Tensor) -> bool:
        if self.scale is None:
            return False
        put(self.scale, self.scale * factor)
        return True

    def scaled(self, q: Tensor) -> Tensor:
        """q [B, T, H, F] times the learned scale of its head, or else the published 1 / sqrt(F)."""
        if self.scale is None:
            return q * self.feature_dim**-0.5
        return q * self.scale.to(q.dtype)[:, None]

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        size = (batch, self.heads, self.feature_dim, self.value_dim)
        return {"sums": torch.zeros(size, dtype=dtype, device=device)}


class Moving(Overwriting):
    """Base of the rules that `generalized_delta` computes: what the state holds under a is added under b."""

    decays = ("feature",)

    def terms(self, stream: Stream) -> Terms:
        """What the kernel takes."""
        raise NotImplementedError(type(self))  # pragma: no cover - every rule defines it

    def defined(self, stream: Stream, terms: Terms) -> Partial:
        """The definition, of terms that need not be the stream's own."""
        k, v = terms[1], terms[2]
        empty = k.new_zeros(k.shape[0], self.heads, self.feature_dim, v.shape[-1])
        return Partial(generalized_delta_reference(*terms, stream.docs, empty)[0], None)

    def parallel(self, stream: Stream) -> Partial:
        return self.defined(stream, self.terms(stream))

    def chunked(self, stream: Stream, state: State) -> Partial:
        *terms, _ = self.terms(stream)
        decays = stream.decays()
        assert decays is not None
        with self.form():
            q, k, v, a, b = stream.narrow(*terms)
            out, sums = generalized_delta_chunk(q, k, v, a, b, decays, stream.docs, state["sums"])
        state.write({"sums": sums})
        return Partial(out.to(stream.q.dtype), None)

    def step(self, stream: Stream, state: State) -> Partial:
        q, k, v, a, b, log_decay = (x[:, 0] for x in self.terms(stream))
        with self.form():
            return Partial(generalized_delta_step(q, k, v, a, b, log_decay, state["sums"])[:, None], None)
