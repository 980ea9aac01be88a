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

    What all keys have in common is no deviation: sums are of k - a, a the map's value at zero (`FeatureMap.at_zero`).
    The same in exact numbers, it leaves digits to the differences where features lie about a.

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

    @property
    def names(self) -> tuple[str, str]:
        """Of other sums another name, so that a kept state that has the features themselves is refused."""
        # not by super(): what looks at it there cannot be compiled
        return ("sums_from_zero", "norms_from_zero") if self.at_zero else self.NAMES

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        values = torch.zeros(batch, self.heads, self.value_dim, dtype=dtype, device=device)
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return super().initial(batch, dtype, device) | {"values": values, "seen": seen}

    def keys(self, stream: Stream) -> Tensor:
        """k - a, and nothing where nobody sees the key: there its features are zero already."""
        if not self.at_zero:
            return stream.k
        return stream.k - stream.valid[..., None, None].to(stream.k.dtype) * self.at_zero

    def parallel(self, stream: Stream) -> Partial:
        place, _ = positions(stream.valid, stream.docs, stream.docs.new_zeros(len(stream.docs)))
        total = running(self._values(stream), stream.docs)
        stream = replace(stream, log_decay=stream.k.new_zeros(stream.k.shape[:3]))
        return self._centered(super().parallel(stream), stream.q, total, place)

    def chunked(self, stream: Stream, state: State) -> Partial:
        total, place = self._carried(stream, state)
        # once, as the kernel reads it: what is added to its weights is of the same query
        stream = replace(stream, q=stream.narrow(stream.q, grows=True)[0])
        return self._centered(super().chunked(stream, state), stream.q, total, place)

    def step(self, stream: Stream, state: State) -> Partial:
        total, place = self._carried(stream, state)
        return self._centered(super().step(stream, state), stream.q, total, place)

    def _values(self, stream: Stream) -> Tensor:
        return stream.v * stream.valid[..., None, None].to(stream.v.dtype)

    def _carried(self, stream: Stream, state: State) -> tuple[Tensor, Tensor]:
        place, seen = positions(stream.valid, stream.docs, state["seen"])
        total = running(self._values(stream), stream.docs, state["values"])
        state.write({"values": total[:, -1].to(state["values"].dtype), "seen": seen})
        return total, place

    def _centered(self, made: Partial, q: Tensor, total: Tensor, place: Tensor) -> Partial:
        """From S_t^T q_t and n_t.q_t of keys less a, queries, sums of values [B, T, M, V] and places in the document
        [B, T]."""
        assert made.denominator is not None
        found, weight = made.numerator.to(total.dtype), made.denominator[..., None].to(total.dtype)
        count = (place + 1).clamp_min(1)[:, :, None, None].to(total.dtype)
        mean = (total / count).repeat_interleave(found.shape[2] // self.heads, 2)
        scale = self.scale.to(total.dtype)[:, None]
        scale = scale / count if self.config.averaged else scale
        apart = found - weight * mean
        return Partial(self.base(mean, apart, made, q, count) + scale * apart, None)

    def base(self, mean: Tensor, apart: Tensor, made: Partial, q: Tensor, count: Tensor) -> Tensor:
        """What the deviations are added to: weights that add up to one.

        Args:
            mean, apart: m and S^T q - (n.q) m, [B, T, H, V].
            made: S^T q and n.q of keys less a.
            q: [B, T, H, F].
            count: t, [B, T, 1, 1].
        """
        return mean


@UPDATES.register("mala")
class MALA(InLine):
    """w_ts = s_ts / sum_r s_tr + c (s_ts - mean of s_t): linear attention and the deviations of its scores.

    In the paper's order (c + 1 / n.q) S^T q - c (n.q) m, with c = 1 there; here m + (c + 1 / n.q) (S^T q - (n.q) m),
    the bracket as in `inline`. Features must not be negative.

    Limitations: where features of keys are nearly all far below a (elu + 1 of keys that are negative throughout),
    k - a is nearly -a, and in bfloat16 few digits of the deviations are left. A sum of weights below the rounding of
    t a.q counts as that much, and the quotient moves to the mean.
    """

    positive = True

    def base(self, mean: Tensor, apart: Tensor, made: Partial, q: Tensor, count: Tensor) -> Tensor:
        assert made.denominator is not None
        weight = made.denominator[..., None].to(mean.dtype)
        if self.at_zero:
            common = self.at_zero * count * q.sum(-1, keepdim=True, dtype=mean.dtype)
            # a smaller sum is the rounding error of this one, and nothing to divide by
            weight = torch.maximum(weight + common, torch.finfo(made.numerator.dtype).eps * common)
        tiny = torch.finfo(weight.dtype).tiny
        return torch.where(weight > 0, mean + apart / weight.clamp_min(tiny), 0.0)
