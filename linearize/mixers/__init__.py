"""Token mixers: a grammar of parts (one folder a part, one file a choice), wired by `Mixer` in three equal forms."""

from linearize.mixers.base import LayerShape
from linearize.mixers.mixer import BRANCHES, Mixer
from linearize.mixers.spec import PARTS, build, check, has_parameters, needs_training, normalize
from linearize.mixers.state import State

__all__ = [
    "BRANCHES",
    "PARTS",
    "LayerShape",
    "Mixer",
    "State",
    "build",
    "check",
    "has_parameters",
    "needs_training",
    "normalize",
]
