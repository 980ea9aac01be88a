"""Focused features: powers sharpen a ReLU's direction, not its length (FLatten, Han et al. 2023, arXiv 2308.00442)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.mixers.base import LayerShape, Part
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import FLOOR, ParameterFree
from linearize.mixers.options import number


@FEATURE_MAPS.register("focused")
class Focused(ParameterFree):
    """phi(x) = |u| u^p / |u^p| with u = max(x, 0), the power taken of each dim; F = K, no parameters.

    The larger p, the nearer the direction of phi(x) comes to the axis of its largest dim: weights of queries and keys
    that share that dim grow, others fall, as softmax's are. Features are at least 1e-12.

    Limitations: as of `relu`, the negative half of a head is lost. The paper adds a depthwise convolution of the values
    to the output, against the low rank of such weights; here a short convolution may stand in front of the branch.
    """

    @dataclass
    class Config(Part.Config):
        power: float = number(3.0, least=1, most=16)
        """p."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.power = config.power

    def features(self, x: Tensor) -> Tensor:
        u = x.relu()
        length = _length(u)
        raised = (u / length).pow(self.power)
        return (length * raised / _length(raised)).clamp_min(FLOOR)


def _length(x: Tensor) -> Tensor:
    """[..., 1], with a gradient at zero."""
    return x.square().sum(-1, keepdim=True).clamp_min(FLOOR**2).sqrt()
