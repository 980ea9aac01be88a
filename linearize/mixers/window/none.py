"""No window: every key goes to the recurrent branch at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.base import Part, Partial
from linearize.mixers.state import State
from linearize.mixers.window import WINDOWS, Handed, Window


@WINDOWS.register("none")
class NoWindow(Window):
    """Pure linear attention: the recurrent branch sees the query's own key too.

    A teacher's own attention sink is left out: there is no softmax whose sum of weights it could join.
    """

    size = 0
    spreads = True

    @dataclass
    class Config(Part.Config):
        pass

    def parallel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        visible: Tensor,
        age: Tensor,
        sink: Tensor | None = None,
    ) -> tuple[Partial | None, Tensor | None]:
        return None, visible

    def chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        docs: Tensor,
        state: State,
        front: Tensor | None = None,
        sink: Tensor | None = None,
        *,
        fresh: bool = False,
        whole: bool = False,
    ) -> tuple[Partial | None, Handed | None]:
        return None, Handed(k, v, valid)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, state: State, sink: Tensor | None = None
    ) -> tuple[Partial | None, Handed | None]:
        return None, Handed(k, v, valid)
