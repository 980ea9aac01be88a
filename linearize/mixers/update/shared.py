"""What the rules share that take something out of one matrix before they write into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, fill
from linearize.mixers.update import Update


class Overwriting(Update):
    """Base of the delta rules: the state is one matrix [F, V] a head, and a learned scale per query head stands on it.

    Arguments are those of `Update`; the config has a `scale`, where that starts.
    """

    sums_weights = False
    uses_hidden = True

    def __init__(
        self,
        config: Any,
        heads: int,
        feature_dim: int,
        value_dim: int,
        shape: LayerShape,
        running_sum: bool = True,
    ) -> None:
        super().__init__(config, heads, feature_dim, value_dim, shape, running_sum)
        self.config = config
        self.make(shape)
        self.scale = nn.Parameter(torch.empty(shape.heads))
        self.reset_parameters()

    def make(self, shape: LayerShape) -> None:
        """The rule's own parameters, before the scale and without values."""
        raise NotImplementedError(type(self))  # pragma: no cover - every rule defines it

    def reset_parameters(self) -> None:
        fill(self.scale, self.config.scale)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        size = (batch, self.heads, self.feature_dim, self.value_dim)
        return {"sums": torch.zeros(size, dtype=dtype, device=device)}
