"""Gated slot attention: a fixed number of slots, read by softmax (GSA, Zhang et al. 2024, arXiv 2409.07146)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.kernels.gated_linear import gated_linear_chunk, gated_linear_reference, gated_linear_step
from linearize.kernels.slots import slots_chunk, slots_reference, slots_step
from linearize.mixers.base import LayerShape, Part, Partial, running
from linearize.mixers.options import WIDEST, number
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream, Update
from linearize.mixers.update.start import LearnedStart, kept_since


@UPDATES.register("slots")
class Slots(Update):
    """K~_t = diag(a_t) K~_{t-1} + (1 - a_t) k_t^T, V~ likewise, o_t = V~_t^T softmax(K~_t q_t): two memories.

    The gate has one value per slot. Scores are not scaled, as in the published code; the softmax over the slots takes
    the place of a normalizer. With a learned start both memories begin with one of their own (`start.LearnedStart`);
    the passes of the kernel then run one by one, since what the first answers comes between them.
    """

    decays = ("feature",)
    sums_weights = False

    @dataclass
    class Config(Part.Config):
        slots: int = number(64, least=1, most=WIDEST)
        """S."""
        start: bool = False
        """Every text begins with learned slots, zero at the start."""

    def make(self, shape: LayerShape) -> None:
        self.slots = self.config.slots
        self.learned_keys: LearnedStart | None = None
        if self.config.start:
            sizes = ((self.feature_dim, self.slots), (self.slots, self.value_dim))
            self.learned_keys, self.learned = (
                LearnedStart(self.heads, *size, running_sum=False, weight=1.0) for size in sizes
            )

    def reset_parameters(self) -> None:
        for learned in (self.learned_keys, self.learned):
            if learned is not None:
                learned.start()

    @classmethod
    def gate_dim(cls, config: Any, feature_dim: int) -> int:
        return config.slots

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        keys = (batch, self.heads, self.feature_dim, self.slots)
        values = (batch, self.heads, self.slots, self.value_dim)
        return {
            "slot_keys": torch.zeros(keys, dtype=dtype, device=device),
            "slot_values": torch.zeros(values, dtype=dtype, device=device),
        } | self.decayed(batch, dtype, device)

    def parallel(self, stream: Stream) -> Partial:
        assert stream.log_decay is not None
        batch, values = stream.k.shape[0], stream.v.shape[-1]
        keys = stream.k.new_zeros(batch, self.heads, self.feature_dim, self.slots)
        empty = (keys, stream.k.new_zeros(batch, self.heads, self.slots, values))
        if self.learned is None:
            out, _ = slots_reference(stream.q, stream.k, stream.v, None, stream.log_decay, stream.docs, empty)
            return Partial(out, None)
        left, writes = running(stream.log_decay, stream.docs), -stream.log_decay.expm1()
        rest: dict[str, Any] = {"normalize": False, "docs": stream.docs}
        scores, _, _ = gated_linear_reference(
            stream.q, stream.k, writes, stream.log_decay, state=(keys, None), decay_values=True, **rest
        )
        shares = self._shares(scores, stream.q, left)
        out, _, _ = gated_linear_reference(
            shares, writes, stream.v, stream.log_decay, state=(empty[1], None), **rest
        )
        return self.learned.added(Partial(out, None), shares, left, weights=stream.weights)

    def chunked(self, stream: Stream, state: State) -> Partial:
        decays, before = stream.decays(), (state["slot_keys"], state["slot_values"])
        assert decays is not None and stream.log_decay is not None
        q, k, v = stream.narrow(stream.q, stream.k, stream.v)
        if self.learned is None:
            with self.form():
                out, after = slots_chunk(q, k, v, None, decays, stream.docs, before)
            state.write(dict(zip(("slot_keys", "slot_values"), after, strict=True)))
            return Partial(out.to(stream.q.dtype), None)
        left = kept_since(stream.log_decay, stream.docs, state)
        writes = (-stream.log_decay.expm1()).to(v.dtype)
        rest: dict[str, Any] = {"docs": stream.docs, "normalize": False}
        with self.form():
            scores, _, (keys, _) = gated_linear_chunk(
                q, k, writes, decays, state=(before[0], None), decay_values=True, **rest
            )
            shares = self._shares(scores, q, left).to(v.dtype)
            out, _, (values, _) = gated_linear_chunk(
                shares, writes, v, decays, state=(before[1], None), **rest
            )
        state.write({"slot_keys": keys, "slot_values": values})
        made = Partial(out.to(stream.q.dtype), None)
        return self.learned.added(made, shares, left, weights=stream.weights)

    def step(self, stream: Stream, state: State) -> Partial:
        assert stream.log_decay is not None
        q, k, v, log_decay = (x[:, 0] for x in (stream.q, stream.k, stream.v, stream.log_decay))
        if self.learned is None:
            with self.form():
                out = slots_step(q, k, v, None, log_decay, state["slot_keys"], state["slot_values"])
            return Partial(out[:, None], None)
        left = kept_since(stream.log_decay, stream.docs, state)
        writes = -log_decay.expm1()
        with self.form():
            scores, _ = gated_linear_step(q, k, writes, log_decay, state["slot_keys"], decay_values=True)
            shares = self._shares(scores[:, None], stream.q, left)
            out, _ = gated_linear_step(
                shares[:, 0].to(v.dtype), writes.to(v.dtype), v, log_decay, state["slot_values"]
            )
        return self.learned.added(Partial(out[:, None], None), shares, left)

    def _shares(self, scores: Tensor, q: Tensor, left: Tensor | None) -> Tensor:
        """What the query [B, T, H, F] takes of each slot [B, T, H, S], with what learned keys add to its scores."""
        assert self.learned_keys is not None and left is not None
        own = self.learned_keys.read(q, None).numerator
        kept = left.exp().to(own.dtype).repeat_interleave(own.shape[2] // left.shape[2], 2)
        return (scores + own * kept).softmax(-1)
