"""What happens to the mixer's output before the model's own output projection; one file each."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import Tensor

from linearize.mixers.base import LayerShape, Part
from linearize.registry import Registry, discover


class Output(Part):
    """Base of the outputs.

    Attributes:
        uses_hidden: whether it reads the layer's input.
        scales: whether what comes in n times as large goes out n times as large.
        normalizes: whether the size of what comes in says nothing.
    """

    uses_hidden: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    normalizes: ClassVar[bool] = False

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__()

    def fit(self, y: Tensor, hidden: Tensor, target: Tensor) -> None:
        """Set parameters so that the output is nearest the teacher's, by least squares; nothing by default.

        Args:
            y: [N, H, V] what comes in.
            hidden: [N, D] the layer's input.
            target: [N, H, V] what the teacher gives.
        """

    def stretch(self, factor: Tensor) -> bool:
        """Multiply what goes out by [H, V]; false, and nothing done, where no parameter says it."""
        return False

    def forward(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        """y [B, T, H, V], hidden [B, T, D] -> [B, T, H, V]."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered output defines it


OUTPUTS: Registry[Output] = Registry("output")
discover(sys.modules[__name__])
