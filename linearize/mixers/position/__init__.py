"""Which branch sees rotated queries and keys; one file each."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape, Part
from linearize.registry import Registry, discover


class Position(Part):
    """Base of the position choices.

    Attributes:
        window_rotated, recurrent_rotated: whether the branch takes q and k after RoPE, as the teacher's layer has them.
        turns: whether the recurrent branch's are turned by `turned` beside that; it reads the layer's input.
    """

    window_rotated: bool = True
    recurrent_rotated: bool = True
    turns: ClassVar[bool] = False

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__()

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Empty tensors of the state, each [B, ...]; `dtype` is float32 or wider."""
        return {}

    def turned(
        self, q: Tensor, k: Tensor, hidden: Tensor, valid: Tensor, docs: Tensor, carried: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K] and k [B, T, N, K] turned, and the phases [B, ...] that the next call carries.

        Args:
            hidden: [B, T, D].
            valid: [B, T] bool; padding turns nothing.
            docs: [B, T] document numbers; phases begin with the document.
            carried: what the call before gave, or None at a beginning.
        """
        raise NotImplementedError(type(self))  # pragma: no cover - every choice that turns defines it


POSITIONS: Registry[Position] = Registry("position")
discover(sys.modules[__name__])
