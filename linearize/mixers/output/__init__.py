"""What happens to the mixer's output before the model's own output projection; one file each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, fill, wide
from linearize.registry import Registry, discover


class Output(Part):
    """Base of the outputs.

    With ``constant`` there is a number [H, V] behind it that no token changes, zero at the start. A softmax rests on a
    text's first token where it has nothing to look for, and what comes of that is much the same for every token; a
    recurrent branch without a window has nothing to say it with.

    Attributes:
        uses_hidden: whether it reads the layer's input.
        scales: whether what comes in n times as large goes out n times as large, but for the constant.
        normalizes: whether the size of what comes in says nothing.
        constant: [H, V], or None.
        mix: [D], how much of the token before it reads in place of a token, or None for nothing (token shift).
    """

    uses_hidden: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    normalizes: ClassVar[bool] = False

    constant: nn.Parameter | None
    mix: nn.Parameter | None

    @dataclass
    class Config(Part.Config):
        constant: bool = False
        """Whether a learned constant is added to each head and dim, which a calibration sets."""

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__()
        made = nn.Parameter(torch.empty(shape.heads, shape.value_dim)) if config.constant else None
        self.register_parameter("constant", made)
        # an option of those that read the layer's input
        shifts = getattr(config, "shift", False)
        self.register_parameter("mix", nn.Parameter(torch.empty(shape.hidden_dim())) if shifts else None)

    def reset_parameters(self) -> None:
        if self.constant is not None:
            fill(self.constant, 0.0)
        if self.mix is not None:
            fill(self.mix, 0.0)

    def fit(self, y: Tensor, hidden: Tensor, target: Tensor) -> None:
        """Set parameters but the constant so that the output is nearest the teacher's, by least squares.

        Nothing by default. The constant is zero when it is called, and its share is not in `target`.

        Args:
            y: [N, H, V] what comes in.
            hidden: [N, D] the layer's input.
            target: [N, H, V] what the teacher gives.
        """

    def stretch(self, factor: Tensor) -> bool:
        """Multiply what goes out before the constant by [H, V]; false, and nothing done, where no parameter says it."""
        return False

    def forward(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        """y [B, T, H, V], hidden [B, T, D], mixed with the token before where there is a `mix` -> [B, T, H, V]."""
        made = self.changed(y, hidden)
        return made if self.constant is None else wide(made) + self.constant.to(wide(made).dtype)

    def changed(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        """`forward` without the constant."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered output defines it


OUTPUTS: Registry[Output] = Registry("output")
discover(sys.modules[__name__])
