"""Token losses from final hidden states: the logits of all tokens never exist (see kernels/distill)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.distill import Head, distill_loss, target_log_probs

FUSED = ("next_token", "logits_kl")
"""The objectives that the kernel knows; any other one needs logits."""


@dataclass(frozen=True)
class Final:
    """What a model's head would turn into logits.

    Attributes:
        hidden: [B, T, D], with a graph behind it.
        head: the head's tensors.
        dtype: in which the head computes.
    """

    hidden: Tensor
    head: Head
    dtype: torch.dtype


def fused(objectives: Collection[str]) -> bool:
    """Whether hidden states are enough for these objectives."""
    return set(objectives) <= set(FUSED)


def final_backward(
    student: Final,
    targets: Tensor,
    objectives: Mapping[str, float],
    *,
    teacher: Final | None,
    weights: Tensor,
) -> Tensor:
    """Back-propagate ``sum(weight * loss)`` of `FUSED` objectives through the student's hidden states and head.

    Args:
        student: its hidden states and head.
        targets: [B, T] int64.
        objectives: objective name -> weight.
        teacher: the teacher's; needed by logits_kl.
        weights: [B, T] what each token's loss is multiplied by, zero where there is none.

    Returns:
        Scalar, detached, float32 or wider.
    """
    assert fused(objectives), f"{', '.join(objectives)}: not all of them are fused"
    with torch.enable_grad():
        loss = distill_loss(
            student.hidden.flatten(0, 1),
            student.head,
            targets.flatten(),
            weights.flatten(),
            next_token=objectives.get("next_token", 0.0),
            divergence=objectives.get("logits_kl", 0.0),
            teacher=None if teacher is None else (teacher.hidden.detach().flatten(0, 1), teacher.head),
            dtype=student.dtype,
        )
        loss.backward()
    return loss.detach()


def final_log_probs(final: Final, targets: Tensor, seen: Tensor) -> Tensor:
    """Log-probability [B, T] of each target, 0 where `seen` [B, T] is false; no graph."""
    found = target_log_probs(
        final.hidden.detach().flatten(0, 1), final.head, targets.flatten(), seen.flatten(), dtype=final.dtype
    )
    return found.view_as(targets)
