"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), the teacher as the reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from linearize.objectives.base import OBJECTIVES, PairObjective


@OBJECTIVES.register("dpo")
class DPO(PairObjective):
    """``-log sigmoid(beta * margin)``, mean over pairs; a margin sums over the tokens of the answers, end included.

    The reference of a converted model is the softmax model that it comes from, so the loss starts where the student
    already differs from it, not at log 2.
    """

    def pairs(self, margin: Tensor, beta: float) -> Tensor:
        return -F.logsigmoid(beta * margin)
