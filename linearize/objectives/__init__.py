"""Training objectives, by name: what a stage drives down.

Three levels, never mixed in a stage. A *layer* objective compares the student's attention with the teacher's
inside one layer and never sees another one; a *model* objective compares what the whole model predicts; a *pair*
objective compares two answers to one prompt. Adding an objective is adding a file here.
"""

from __future__ import annotations

import sys

from linearize.objectives.base import (
    OBJECTIVES,
    BlockObjective,
    LayerObjective,
    OutputObjective,
    PairObjective,
    TokenObjective,
    level_of,
    names,
)
from linearize.objectives.final import Final, fused
from linearize.objectives.layer import layer_backward
from linearize.objectives.pair import pair_backward
from linearize.objectives.token import next_targets, token_backward
from linearize.objectives.top_k import TopK
from linearize.registry import discover

discover(sys.modules[__name__])

get = OBJECTIVES.get

__all__ = [
    "OBJECTIVES",
    "BlockObjective",
    "Final",
    "LayerObjective",
    "OutputObjective",
    "PairObjective",
    "TokenObjective",
    "TopK",
    "fused",
    "get",
    "layer_backward",
    "level_of",
    "names",
    "next_targets",
    "pair_backward",
    "token_backward",
]
