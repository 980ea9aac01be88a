"""The sum of the weights, as linear attention has it: the update rule's own recurrence with values of one."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.mixers.base import Part, Partial
from linearize.mixers.normalizer import NORMALIZERS, Normalizer


@NORMALIZERS.register("running_sum")
class RunningSum(Normalizer):
    """y = sum w v / sum w, numerator and denominator under the same decay; float32 or wider.

    Needs features that are not negative, or the sum may vanish.
    """

    running_sum = True

    @dataclass
    class Config(Part.Config):
        pass

    def forward(self, partial: Partial) -> Partial:
        return partial
