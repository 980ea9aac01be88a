"""Signed weights that add up to one (InLine, Han et al. 2024, arXiv 2412.06590; MALA, Fan et al. 2025, 2507.00698)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Partial, fill, positions, running
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.additive import Additive


@UPDATES.register("inline")
class InLine(Additive):
    """Weights w_ts = 1/t + c (s_ts - mean of s_t), s_ts = q_t.k_s over the t tokens so far: o_t = m_t + c (S_t^T q_t -
    (n_t.q_t) m_t), m_t the mean of the values and n_t the sum of the keys.

    Subtracting takes the place of dividing, so features may have any sign, and two queries of different length no
    longer have the same weights. c = scale / t, `scale` learned for each query head, is the softmax to first order in
    its scores; c = scale (`averaged` false) is published, whose deviations grow with the text.

    Limitations: no decay; weights may be negative, where softmax's are not.
    """

    decays: ClassVar[tuple[str, ...]] = ("none",)
    dense = False
    sums_weights = False
    takes_products: ClassVar[bool] = False

    @dataclass
    class Config(Additive.Config):
        scale: float = number(1.0, above=0, most=1e6)
        """The scale of the deviations at the start."""
        averaged: bool = True
        """Deviations over the number of tokens."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return ["start: a learned start is no token of the mean; leave it out"] if self.start else []

    def make(self, shape: LayerShape) -> None:
        super().make(shape)
        self.running_sum = True  # the sum of the keys is needed whatever stands behind
        self.scale = nn.Parameter(torch.empty(shape.heads))

    def reset_parameters(self) -> None:
        fill(self.scale, self.config.scale)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        values = torch.zeros(batch, self.heads, self.value_dim, dtype=dtype, device=device)
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return super().initial(batch, dtype, device) | {"values": values, "seen": seen}

    def parallel(self, stream: Stream) -> Partial:
        place, _ = positions(stream.valid, stream.docs, stream.docs.new_zeros(len(stream.docs)))
        total = running(self._values(stream), stream.docs)
        stream = replace(stream, log_decay=stream.k.new_zeros(stream.k.shape[:3]))
        return self._centered(super().parallel(stream), total, place)

    def chunked(self, stream: Stream, state: State) -> Partial:
        total, place = self._carried(stream, state)
        return self._centered(super().chunked(stream, state), total, place)

    def step(self, stream: Stream, state: State) -> Partial:
        total, place = self._carried(stream, state)
        return self._centered(super().step(stream, state), total, place)

    def _values(self, stream: Stream) -> Tensor:
        return stream.v * stream.valid[..., None, None].to(stream.v.dtype)

    def _carried(self, stream: Stream, state: State) -> tuple[Tensor, Tensor]:
        place, seen = positions(stream.valid, stream.docs, state["seen"])
        total = running(self._values(stream), stream.docs, state["values"])
        state.write({"values": total[:, -1].to(state["values"].dtype), "seen": seen})
        return total, place

    def _centered(self, made: Partial, total: Tensor, place: Tensor) -> Partial:
        """From S_t^T q_t and n_t.q_t, sums of values [B, T, M, V] and places in the document [B, T]."""
        assert made.denominator is not None
        found, weight = made.numerator.to(total.dtype), made.denominator[..., None].to(total.dtype)
        count = (place + 1).clamp_min(1)[:, :, None, None].to(total.dtype)
        mean = (total / count).repeat_interleave(found.shape[2] // self.heads, 2)
        scale = self.scale.to(total.dtype)[:, None]
        scale = scale / count if self.config.averaged else scale
        return Partial(self.base(found, weight, mean) + scale * (found - weight * mean), None)

    def base(self, found: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
        """What the deviations are added to: weights that add up to one."""
        return mean


@UPDATES.register("mala")
class MALA(InLine):
    """w_ts = s_ts / sum_r s_tr + c (s_ts - mean of s_t): linear attention and the deviations of its scores.

    In the paper's order (c + 1 / n.q) S^T q - c (n.q) m, with c = 1 there. Features must not be negative.

    Limitations: deviations are small differences of large sums where all features are near one number, as those of
    elu + 1 are for short queries and keys; in bfloat16 few of their digits are left.
    """

    positive = True

    def base(self, found: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
        return torch.where(weight > 0, found / weight.clamp_min(torch.finfo(weight.dtype).tiny), 0.0)
