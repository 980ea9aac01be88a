"""Log-linear attention over the additive rule, plain or gated: Mamba-2 and GLA on levels; see `levels`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from linearize.kernels.gated_linear import gated_linear_step
from linearize.mixers.base import LayerShape, Partial
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.additive import Additive
from linearize.mixers.update.levels import Given, LevelOptions, Levels, each_head, each_level, on_first


@UPDATES.register("log_linear")
class LogLinear(Levels, Additive):
    """`additive` on levels; numerators and denominators are weighed alike, so a running sum stays one of weights."""

    dense = False
    takes_products: ClassVar[bool] = False
    uses_hidden = True

    @dataclass
    class Config(LevelOptions, Additive.Config):
        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return self.level_problems()

    def make(self, shape: LayerShape) -> None:
        super().make(shape)
        self.make_levels(self.config, shape)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.reset_levels()

    def without(self, stream: Stream, written: Tensor) -> Stream:
        return replace(stream, k=stream.k * written.to(stream.k.dtype))

    def given(self, stream: Stream) -> Given:
        q, k, v = stream.narrow(stream.q, self.keys(stream), stream.v, grows=True)
        return q, k, v, None

    def step(self, stream: Stream, state: State) -> Partial:
        held, shares, decay = self.level_step(stream, state)
        count = self.levels + 2
        # the answer is in the dtype of the values, and float16 may not hold a sum
        v = stream.v.float() if stream.v.dtype == torch.float16 else stream.v
        sums = state["stretch_sums"].flatten(1, 2)
        norms: Any = state["stretch_norms"].flatten(1, 2) if self.running_sum else None
        with self.form():
            numerator, denominator = gated_linear_step(
                each_level(stream.q[:, 0], count),
                on_first(stream.k[:, 0], count),
                each_level(v[:, 0], count),
                decay.flatten(1, 2),
                sums,
                norms,
                live=each_head(held, sums.shape[1]),
            )
        numerator = (numerator.unflatten(1, (count, -1)) * shares[..., None]).sum(1)
        if denominator is not None:
            denominator = (denominator.unflatten(1, (count, -1)) * shares).sum(1)[:, None]
        return Partial(numerator[:, None], denominator)
