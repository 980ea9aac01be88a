"""The definition: all logits at once, gradients by autograd, any precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Head:
    """A language model's last step: z = cap(scale (x W^T + b)), with cap(z) = softcap tanh(z / softcap).

    Attributes:
        weight: W [V, D].
        bias: b [V], or None.
        scale: factor on the product (Granite divides by its `logits_scaling`).
        softcap: bound of the logits, in nats (Gemma 2); None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def shape_logits(product: Tensor, head: Head) -> Tensor:
    """Scale and cap of what the head's matrix gives, [..., V]."""
    scaled = product * head.scale
    return scaled if head.softcap is None else head.softcap * torch.tanh(scaled / head.softcap)


def distill_reference(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    weights: Tensor,
    *,
    next_token: float = 0.0,
    divergence: float = 0.0,
    teacher: tuple[Tensor, Head] | None = None,
) -> Tensor:
    """sum over tokens n of w_n (a CE(z_n, target) + b KL(teacher_n || student_n)), in nats.

    Args:
        hidden: [N, D] final hidden states of the student.
        head: its head.
        targets: [N] int64 token that follows; any number where w is zero.
        weights: w [N], zero for tokens without a loss.
        next_token, divergence: a and b.
        teacher: the teacher's hidden states [N, D'] and head, over the same vocabulary; needed where b is not zero.
            It takes no gradient.

    Returns:
        Scalar.
    """
    log_student = F.log_softmax(shape_logits(F.linear(hidden, head.weight, head.bias), head), -1)
    chosen = log_student.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    each = -next_token * chosen
    if divergence:
        assert teacher is not None, "the teacher is missing"
        states, theirs = teacher
        with torch.no_grad():
            log_teacher = F.log_softmax(
                shape_logits(F.linear(states, theirs.weight, theirs.bias), theirs), -1
            )
        each = each + divergence * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return torch.where(weights != 0, each * weights, 0.0).sum()
