"""Gated slot attention: a fixed number of slots, read by softmax (GSA, Zhang et al. 2024, arXiv 2409.07146)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.kernels.slots import slots_chunk, slots_reference, slots_step
from linearize.mixers.base import Part, Partial
from linearize.mixers.options import WIDEST, number
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream, Update


@UPDATES.register("slots")
class Slots(Update):
    """K~_t = diag(a_t) K~_{t-1} + (1 - a_t) k_t^T, V~ likewise, o_t = V~_t^T softmax(K~_t q_t): two memories.

    The gate has one value per slot. Scores are not scaled, as in the published code; the softmax over the slots takes
    the place of a normalizer.
    """

    decays = ("feature",)
    sums_weights = False

    @dataclass
    class Config(Part.Config):
        slots: int = number(64, least=1, most=WIDEST)
        """S."""

    def __init__(self, config: Config, *arguments: Any, **settings: Any) -> None:
        super().__init__(config, *arguments, **settings)
        self.slots = config.slots

    @classmethod
    def gate_dim(cls, config: Any, feature_dim: int) -> int:
        return config.slots

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {
            "slot_keys": torch.zeros(
                batch, self.heads, self.feature_dim, self.slots, dtype=dtype, device=device
            ),
            "slot_values": torch.zeros(
                batch, self.heads, self.slots, self.value_dim, dtype=dtype, device=device
            ),
        }

    def parallel(self, stream: Stream) -> Partial:
        assert stream.log_decay is not None
        batch, values = stream.k.shape[0], stream.v.shape[-1]
        empty = (
            stream.k.new_zeros(batch, self.heads, self.feature_dim, self.slots),
            stream.k.new_zeros(batch, self.heads, self.slots, values),
        )
        out, _ = slots_reference(stream.q, stream.k, stream.v, None, stream.log_decay, stream.docs, empty)
        return Partial(out, None)

    def chunked(self, stream: Stream, state: State) -> Partial:
        decays, before = stream.decays(), (state["slot_keys"], state["slot_values"])
        assert decays is not None
        with self.form():
            q, k, v = stream.narrow(stream.q, stream.k, stream.v)
            out, after = slots_chunk(q, k, v, None, decays, stream.docs, before)
        state.write(dict(zip(("slot_keys", "slot_values"), after, strict=True)))
        return Partial(out.to(stream.q.dtype), None)

    def step(self, stream: Stream, state: State) -> Partial:
        assert stream.log_decay is not None
        q, k, v, log_decay = (x[:, 0] for x in (stream.q, stream.k, stream.v, stream.log_decay))
        with self.form():
            out = slots_step(q, k, v, None, log_decay, state["slot_keys"], state["slot_values"])
        return Partial(out[:, None], None)
