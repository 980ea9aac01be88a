"""Next-token prediction: cross-entropy of the student's logits to the text itself."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from linearize.objectives.base import OBJECTIVES, TokenObjective


@OBJECTIVES.register("next_token")
class NextToken(TokenObjective):
    """Cross-entropy in nats, mean over the tokens that carry a label."""

    def tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        return F.cross_entropy(student, targets, reduction="none", ignore_index=-100)
