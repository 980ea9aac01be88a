"""Rules that join the window's and the recurrent branch's partials into one output; one file each."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from linearize.mixers.base import LayerShape, Part, Partial
from linearize.registry import Registry, discover


class Combine(Part):
    """Base of the rules; built only for mixers that have both branches.

    Args:
        config: the rule's options.
        shape: the layer's numbers.
    """

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__()

    def forward(self, window: Partial, recurrent: Partial) -> Tensor:
        """Two partials -> output [B, T, H, V]."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered rule defines it


COMBINES: Registry[Combine] = Registry("combination")
discover(sys.modules[__name__])
