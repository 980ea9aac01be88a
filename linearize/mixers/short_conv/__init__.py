"""Short causal convolutions on q, k, v before the feature map; one file each."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import LayerShape, Part
from linearize.mixers.state import State
from linearize.registry import Registry, discover


class ShortConv(Part):
    """Base of the convolutions."""

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__()

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Empty tensors of the state, each [B, ...]."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered one defines it

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        valid: Tensor,
        docs: Tensor | None,
        state: State | None,
        front: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, heads, width] -> the same shapes; padding is skipped, `docs` None is one document.

        `state` is None in the parallel form, else read and written; its tokens belong behind the `front` [B] padding of
        each row, which in the forms with a state has none between its tokens.
        """
        raise NotImplementedError(type(self))  # pragma: no cover


SHORT_CONVS: Registry[ShortConv] = Registry("short convolution")
discover(sys.modules[__name__])
