"""A constant on each head's output: what a softmax's sink gives, where nothing in front of it can say that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.base import LayerShape
from linearize.mixers.output import OUTPUTS, Output


@OUTPUTS.register("constant")
class OutputConstant(Output):
    """y + c, c [H, V]: for mixers that have no other output part.

    RWKV's layers have it as the bias of the norm behind their heads (Peng et al. 2024, arXiv 2404.05892); conversions
    that leave out the norm (RADLADS, arXiv 2505.03005) lose it.
    """

    scales = True

    @dataclass
    class Config(Output.Config):
        constant: bool = True
        """Whether there is one; without it the part does nothing."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.reset_parameters()

    def changed(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        return y
