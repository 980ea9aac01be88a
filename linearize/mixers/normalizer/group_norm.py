"""A norm of each head's output in place of a denominator (SUPRA, Mercat et al. 2024, arXiv 2405.06640, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.mixers.base import LayerShape, Part, Partial, fill, put, wide
from linearize.mixers.normalizer import NORMALIZERS, Normalizer
from linearize.mixers.options import choice_problems, number


@NORMALIZERS.register("group_norm")
class GroupNorm(Normalizer):
    """Each head's sum less its mean over the value dims, over its standard deviation, per token; times a scale.

    SUPRA's has no scale and no shift. A scale per head, one at the start, lets the output's size meet the teacher's;
    ``kind: rms`` leaves the mean in.

    Limitations: the size of the output carries nothing; it breaks the match with the teacher until it is trained.
    """

    EPSILON = 1e-5
    scale: nn.Parameter | None

    @dataclass
    class Config(Part.Config):
        kind: str = "layer"
        """layer (mean off) or rms."""
        scale: bool = True
        """A learned scale per head."""
        start: float = number(1.0, above=0)
        """The scale at the start; means of values are small, so teachers' outputs have an rms of 0.03 to 0.5."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(kind=(self.kind, ("layer", "rms")))

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.kind, self.start = config.kind, config.start
        self.register_parameter("scale", nn.Parameter(torch.empty(shape.heads)) if config.scale else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.scale is not None:
            fill(self.scale, self.start)

    def resize(self, factor: Tensor) -> bool:
        if self.scale is None:
            return False
        put(self.scale, self.scale * factor)
        return True

    def forward(self, partial: Partial) -> Partial:
        y = wide(partial.numerator)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdim=True)
        y = y * (y.square().mean(-1, keepdim=True) + self.EPSILON).rsqrt()
        return Partial(y if self.scale is None else y * self.scale.to(y.dtype)[:, None], None)
