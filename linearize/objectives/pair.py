"""A preference step: two answers to one prompt, in one packed sequence, against the teacher's view of both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.objectives.base import OBJECTIVES, PairObjective
from linearize.objectives.final import Final
from linearize.objectives.token import target_log_probs, token_backward


def pair_backward(
    logits: Tensor | Final,
    targets: Tensor,
    side: Tensor,
    objectives: Mapping[str, float],
    *,
    teacher: Tensor | Final,
    beta: float,
    count: Tensor | float,
) -> Tensor:
    """Back-propagate ``sum(weight * loss)`` of the named pair objectives through `logits`.

    A loss is a function of each pair's margin, and the margin a sum over tokens: its gradient is that of next-token
    losses, each weighed by the loss's slope at the margin and by its answer's sign. So no second copy of the logits
    is needed.

    Args:
        logits: [B, T, V] of the student, with a graph behind it, or what its head makes them of; a sequence holds one
            pair as two documents.
        targets: [B, T] int64 from `next_targets`.
        side: [B, T] int64 of the tokens themselves: 1 chosen, -1 rejected, 0 neither.
        objectives: objective name -> weight.
        teacher: [B, T, V] the teacher's logits, or what they are made of.
        beta: see `PairObjective`.
        count: pairs in all micro-batches of the step.

    Returns:
        Scalar tensor, ``sum(weight * loss)`` over the pairs / count, detached; float32 or wider.
    """
    signs = F.pad(side[:, 1:], (0, 1))  # of the token that each position predicts
    difference = target_log_probs(logits, targets) - target_log_probs(teacher, targets)
    with torch.enable_grad():
        margin = (signs * difference).sum(dim=1).requires_grad_()
        parts: list[tuple[PairObjective, float]]
        parts = [(OBJECTIVES.get(name)(), weight) for name, weight in objectives.items()]
        losses = torch.stack([weight * part.pairs(margin, beta) for part, weight in parts]).sum(dim=0)
        (slope,) = torch.autograd.grad(losses.sum(), margin)
    token_backward(logits, targets, {"next_token": 1.0}, count=count, factors=-slope[:, None] * signs)
    return losses.detach().sum() / count
