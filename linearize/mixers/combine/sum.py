"""The plain sum of the two branches' outputs (Lizard, Van Nguyen et al. 2025, arXiv 2507.09025, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from linearize.mixers import fits
from linearize.mixers.base import Part, Partial
from linearize.mixers.combine import COMBINES, Combine


@COMBINES.register("sum")
class Sum(Combine):
    """y = y_window + y_recurrent, each branch normalized by itself; nothing is learned.

    Limitations: the weights of a row add up to two, not one, so the output is no mean of values. Lizard scales the
    window's output by an alpha whose status the paper leaves open; `weighted` has such a factor, `sum` takes one.
    """

    @dataclass
    class Config(Part.Config):
        pass

    def fit(
        self,
        window: Partial,
        recurrent: Partial,
        target: Tensor,
        hidden: Tensor | None,
        resize: Callable[[Tensor], bool],
    ) -> None:
        resize(fits.scale(recurrent.normalized()[0], target - window.normalized()[0]))

    def forward(self, window: Partial, recurrent: Partial, hidden: Tensor | None = None) -> Tensor:
        return window.normalized() + recurrent.normalized()
