"""Which branch sees rotated queries and keys; one file each."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape, Part, accumulator
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


def rotate_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo a rotary embedding (rotate-half convention, possibly on the first dims only).

    The rotation was x cos + rotate_half(x) sin; its inverse is the rotation by the opposite angle, over the square of
    the factor that YaRN and the like put on cos and sin.

    Args:
        x: [B, T, H, K], rotated.
        cos, sin: [B or 1, T, R], R <= K, as transformers hands them to attention modules.

    Returns:
        [B, T, H, K] before the rotation, in float32 or wider.
    """
    x = x.to(accumulator(x.dtype))
    width = cos.shape[-1]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    rotated, rest = x[..., :width], x[..., width:]
    half = width // 2
    turned = torch.cat([-rotated[..., half:], rotated[..., :half]], dim=-1)
    back = (rotated * cos - turned * sin) / (cos.square() + sin.square())
    return torch.cat([back, rest], dim=-1) if rest.shape[-1] else back


POSITIONS: Registry[Position] = Registry("position")
discover(sys.modules[__name__])
