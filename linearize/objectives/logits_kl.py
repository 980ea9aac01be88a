"""Logit distillation (Hinton et al. 2015): predict what the teacher predicts, not only what came."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from linearize.objectives.base import OBJECTIVES, TokenObjective
from linearize.objectives.top_k import TopK, divergence


@OBJECTIVES.register("logits_kl")
class LogitsKL(TokenObjective):
    """KL(teacher || student) over the vocabulary in nats, mean over the tokens that carry a label."""

    needs_teacher = True

    def tokens(self, student: Tensor, teacher: Tensor | TopK | None, targets: Tensor) -> Tensor:
        assert teacher is not None
        if isinstance(teacher, TopK):
            return divergence(student, teacher)
        log_student, log_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
        return F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(dim=-1)
