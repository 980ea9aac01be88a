"""Log-linear attention over the delta rule, plain or gated (Gated DeltaNet, Kimi Delta Attention); see `levels`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from linearize.kernels.gated_delta import delta_step
from linearize.mixers.base import LayerShape, Partial
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.delta import Delta
from linearize.mixers.update.levels import Given, LevelOptions, Levels, each_head, each_level, on_first


@UPDATES.register("log_linear_delta")
class LogLinearDelta(Levels, Delta):
    """`delta` on levels: what a token takes out it takes out of every level, what it writes lies on its own."""

    keeps: ClassVar[bool] = False
    """It would be kept for each level."""

    @dataclass
    class Config(LevelOptions, Delta.Config):
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
        return replace(stream, v=stream.v * written.to(stream.v.dtype))

    def given(self, stream: Stream) -> Given:
        stream, q, k, beta = self._terms(stream)
        q, k, v = stream.narrow(q, k, stream.v)
        return q, k, v, beta

    def step(self, stream: Stream, state: State) -> Partial:
        held, shares, decay = self.level_step(stream, state)
        count = self.levels + 2
        stream, *terms = self._terms(stream)
        q, k, beta = (each_level(x[:, 0], count) for x in terms)
        v = on_first(stream.v[:, 0], count)
        sums = state["stretch_sums"].flatten(1, 2)
        live = each_head(held, sums.shape[1])
        with self.form():
            out = delta_step(q, k, v, beta, decay.flatten(1, 2), sums, live)
        out = (out.unflatten(1, (count, -1)) * shares[..., None]).sum(1)
        return Partial(out[:, None], None)
