"""What the rules share that take something out of one matrix before they write into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linearize.kernels.generalized_delta import (
    generalized_delta_chunk,
    generalized_delta_reference,
    generalized_delta_step,
)
from linearize.mixers.base import LayerShape, Partial, fill, put, running, wide
from linearize.mixers.state import State
from linearize.mixers.update import Stream, Transition, Update
from linearize.mixers.update.start import kept_since


def overwritten(end: Callable[[Tensor, Tensor], Tensor], v: Tensor, empty: Tensor) -> Transition:
    """S -> A S + B of a rule that changes rows of one matrix: B is where nothing ends, A where the identity does.

    Args:
        end: values [B, T, M, V] and a start [B, M, F, V] -> the state behind them.
        v: the values.
        empty: [B, M, F, V].
    """
    width = empty.shape[2]
    eye = torch.eye(width, dtype=empty.dtype, device=empty.device).expand(*empty.shape[:3], width)

    def of_identity() -> Tensor:
        return end(v.new_zeros(*v.shape[:3], width), eye.contiguous())

    # made anew in backward: the rule keeps as much of a run as of that which gives the outputs
    kept = checkpoint(of_identity, use_reentrant=False, preserve_rng_state=False)
    added = checkpoint(end, v, empty, use_reentrant=False, preserve_rng_state=False)
    return Transition(kept, {"sums": added}, mixes=True)


Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""q [B, T, H, F], k [B, T, M, F], v [B, T, M, V], and a, b, log decay [B, T, M, F], as `generalized_delta` names
them."""


class Overwriting(Update):
    """Base of the delta rules: the state is one matrix [F, V] a head, and a learned scale per query head stands on it.

    The config has a `scale`, where that starts. Rules call `make` of this class behind their own parameters.

    Attributes:
        rescales: whether there is that scale; `make` of a rule may say no before it calls this class's.
    """

    sums_weights = False
    uses_hidden = True
    rescales = True
    scale: Tensor | None

    def make(self, shape: LayerShape) -> None:
        if getattr(self.config, "start", False):
            self.learn_start()
        self.register_parameter("scale", nn.Parameter(torch.empty(shape.heads)) if self.rescales else None)

    def reset_parameters(self) -> None:
        if self.learned is not None:
            self.learned.start()
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
        sums = torch.zeros(size, dtype=dtype, device=device)
        return {"sums": sums} | self.decayed(batch, dtype, device)


class Moving(Overwriting):
    """Base of the rules that `generalized_delta` computes: what the state holds under a is added under b.

    A learned start costs a second step of the rule a token, which writes what is taken out of it, but where b = -k: see
    `start.LearnedStart`.

    Attributes:
        takes_under_key: whether b = -k.
    """

    decays = ("feature",)
    takes_under_key: ClassVar[bool] = False

    def terms(self, stream: Stream) -> Terms:
        """What the kernel takes."""
        raise NotImplementedError(type(self))  # pragma: no cover - every rule defines it

    def defined(self, stream: Stream, terms: Terms) -> Partial:
        """The definition, of terms that need not be the stream's own."""
        k, v = terms[1], terms[2]
        empty = k.new_zeros(k.shape[0], self.heads, self.feature_dim, v.shape[-1])
        return Partial(generalized_delta_reference(*terms, stream.docs, empty)[0], None)

    def parallel(self, stream: Stream) -> Partial:
        terms = self.terms(stream)
        if self.learned is None or stream.weights:
            return self.defined(stream, terms)
        left = running(terms[-1], stream.docs)
        twice, docs = self._below(stream, terms, left)
        return self._above(self.defined(replace(stream, docs=docs), twice).numerator, stream, terms[0], left)

    def chunked(self, stream: Stream, state: State) -> Partial:
        *terms, _ = self.terms(stream)
        decays = stream.decays()
        assert decays is not None
        left, docs = None, stream.docs
        given: Terms = (*terms, decays)  # type: ignore[assignment]
        if self.learned is not None and not stream.weights:
            left = kept_since(stream.log_decay, stream.docs, state)
            given, docs = self._below(stream, given, left)
        *narrow, decays = given
        with self.form():
            q, k, v, a, b = stream.narrow(*narrow)
            out, sums = generalized_delta_chunk(q, k, v, a, b, decays, docs, state["sums"])
        state.write({"sums": sums})
        return self._above(out.to(stream.q.dtype), stream, terms[0], left)

    def transits(self) -> bool:
        return type(self).chunked is Moving.chunked and self.learned is None and self.first is None

    def transition(self, stream: Stream) -> Transition:
        """The rule run twice more: from nothing, and from the identity with nothing to write."""
        _, *terms, _ = self.terms(stream)
        decays = stream.decays()
        assert decays is not None
        k, v, a, b = stream.narrow(*terms)

        def end(values: Tensor, start: Tensor) -> Tensor:
            with self.form():
                return generalized_delta_chunk(k, k, values, a, b, decays, stream.docs, start)[1]

        return overwritten(end, v, self.initial(len(k), wide(k).dtype, k.device)["sums"])

    def step(self, stream: Stream, state: State) -> Partial:
        terms, left = self.terms(stream), None
        given = terms
        if self.learned is not None:
            left = kept_since(stream.log_decay, stream.docs, state)
            given, _ = self._below(stream, given, left)
        with self.form():
            for i in range(given[1].shape[1]):
                q, k, v, a, b, log_decay = (x[:, i] for x in given)
                out = generalized_delta_step(q, k, v, a, b, log_decay, state["sums"])
        return self._above(out[:, None], stream, terms[0], left, read=True)

    def _below(self, stream: Stream, terms: Terms, left: Tensor | None) -> tuple[Terms, Tensor]:
        """Terms and documents with what is taken out of a learned start; two steps a token, or one where b = -k."""
        assert self.learned is not None and left is not None and stream.log_decay is not None
        q, k, v, a, b, log_decay = terms
        (low,) = stream.narrow(a)
        taken = self.learned.read(low, left - stream.log_decay.to(left.dtype)).numerator.to(v.dtype)
        if self.takes_under_key:
            return (q, k, v - taken, a, b, log_decay), stream.docs
        rest = torch.zeros_like(k)
        pairs = ((torch.zeros_like(q), q), (k, b), (v, taken), (a, rest), (b, rest), (log_decay, rest))
        q, k, v, a, b, log_decay = (torch.stack([x, y.to(x.dtype)], 2).flatten(1, 2) for x, y in pairs)
        return (q, k, v, a, b, log_decay), stream.docs.repeat_interleave(2, 1)

    def _above(
        self, out: Tensor, stream: Stream, q: Tensor, left: Tensor | None, *, read: bool = False
    ) -> Partial:
        """After the last step of each token (`read`: it alone is given), with what a learned start answers."""
        if self.learned is None or stream.weights:
            return Partial(out, None)
        made = out if read or self.takes_under_key else out[:, 1::2]
        (low,) = stream.narrow(q)
        return self.learned.added(Partial(made, None), low, left)
