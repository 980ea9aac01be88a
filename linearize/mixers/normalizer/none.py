"""No normalizer: the sum of values itself (Liger, RetNet's and the delta rule's recurrences)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.mixers.base import Part
from linearize.mixers.normalizer import NORMALIZERS, Normalizer


@NORMALIZERS.register("none")
class NoNormalizer(Normalizer):
    """y = sum w v. The output's size follows the features' size and the decay."""

    @dataclass
    class Config(Part.Config):
        pass
