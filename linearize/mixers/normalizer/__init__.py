"""What the recurrent branch's sums are divided by; one file each."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from linearize.mixers.base import LayerShape, Part, Partial
from linearize.registry import Registry, discover


class Normalizer(Part):
    """Base of the normalizers.

    Attributes:
        running_sum: whether the update rule has to keep a sum of its weights beside the sum of values.
        signed: whether that sum may have any sign, and so is none that branches could share.
    """

    running_sum: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__()

    def forward(self, partial: Partial) -> Partial:
        """The recurrent branch's partial; with a denominator only where `running_sum`."""
        return Partial(partial.numerator, None)


NORMALIZERS: Registry[Normalizer] = Registry("normalizer")
discover(sys.modules[__name__])
