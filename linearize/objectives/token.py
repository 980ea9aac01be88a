"""The whole model's training step: logits against targets and the teacher's logits, a slice of tokens at once.

A float32 copy of the logits of 8 x 1,024 tokens over a vocabulary of 49,152 is 1.6 GB, and its softmax and
gradient are as much again; here only one slice of them exists. Where a model's head is known (`Final`) not even the
logits themselves do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.objectives.base import OBJECTIVES, TokenObjective
from linearize.objectives.final import Final, final_backward, final_log_probs
from linearize.objectives.top_k import TopK

SLICE_ELEMENTS = 2**24
"""Logits in a slice: 64 MB in float32."""
IGNORED = -100
"""Target of a position that has no loss."""


def next_targets(labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The token that each position predicts.

    Args:
        labels: [B, T] int64 the tokens themselves, -100 where there is no loss.
        position_ids: [B, T] restarting at 0 where a document begins; a document's first token is nobody's
            target.

    Returns:
        [B, T] int64: labels shifted by one, -100 at the end and across document boundaries.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if position_ids is not None:
        begins = F.pad(position_ids[:, 1:] == 0, (0, 1), value=True)
        targets = targets.masked_fill(begins, IGNORED)
    return targets


def token_backward(
    logits: Tensor | Final,
    targets: Tensor,
    objectives: Mapping[str, float],
    *,
    teacher: Tensor | Final | TopK | None = None,
    count: Tensor | float | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Back-propagate ``sum(weight * loss)`` of the named model objectives through `logits`.

    Args:
        logits: [B, T, V] of the student, with a graph behind it; or what its head makes them of, if every objective
            is `fused`.
        targets: [B, T] int64 from `next_targets`.
        objectives: objective name -> weight.
        teacher: [B, T, V] the teacher's logits, or what they are made of, as for the student; or, beside a student's
            logits, the likeliest of them; needed by objectives that compare with it.
        count: what the sum over tokens is divided by: the labeled tokens of all micro-batches of the step, so
            that gradient accumulation gives the gradient of one large batch. Default: those of `targets`.
        factors: [B, T] further weight of each token.

    Returns:
        Scalar float32 tensor, ``sum(weight * loss)``, detached.
    """
    parts: list[tuple[TokenObjective, float]]
    parts = [(OBJECTIVES.get(name)(), weight) for name, weight in objectives.items()]
    assert all(isinstance(part, TokenObjective) for part, _ in parts), "a layer objective in a model stage"
    assert teacher is not None or not any(part.needs_teacher for part, _ in parts), (
        "the teacher's logits are missing"
    )
    labeled = targets != IGNORED
    divisor = labeled.sum().clamp_min(1) if count is None else count
    if isinstance(logits, Final):
        assert not isinstance(teacher, Tensor | TopK), (
            "hidden states of the student beside logits of the teacher"
        )
        each = logits.hidden.new_ones((), dtype=torch.promote_types(logits.dtype, torch.float32)) / divisor
        each = each if factors is None else each * factors
        return final_backward(
            logits, targets, objectives, teacher=teacher, weights=torch.where(labeled, each, 0.0)
        )
    assert not isinstance(teacher, Final), "logits of the student beside hidden states of the teacher"
    vocabulary = logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat, flat_targets = logits.detach().reshape(-1, vocabulary), targets.reshape(-1)
    flat_factors = None if factors is None else factors.reshape(-1)
    flat_teacher = _flat(teacher, vocabulary)
    gradient = torch.empty_like(flat)
    total = torch.zeros((), dtype=dtype, device=logits.device)
    step = max(1, SLICE_ELEMENTS // vocabulary)
    with torch.autocast(logits.device.type, enabled=False):
        for start in range(0, len(flat), step):
            piece = slice(start, start + step)
            leaf = flat[piece].to(dtype).detach().requires_grad_()
            against = None if flat_teacher is None else flat_teacher[piece]
            against = against.to(dtype) if isinstance(against, Tensor) else against
            with torch.enable_grad():
                losses = torch.stack(
                    [weight * part.tokens(leaf, against, flat_targets[piece]) for part, weight in parts]
                )
                each = losses.sum(dim=0) if flat_factors is None else losses.sum(dim=0) * flat_factors[piece]
                loss = torch.where(flat_targets[piece] != IGNORED, each, 0.0).sum() / divisor
                gradient[piece] = torch.autograd.grad(loss, leaf)[0]
            total += loss.detach()
        logits.backward(gradient.view_as(logits))
    return total


def _flat(teacher: Tensor | TopK | None, vocabulary: int) -> Tensor | TopK | None:
    """Token after token."""
    if isinstance(teacher, Tensor):
        return teacher.detach().reshape(-1, vocabulary)
    return None if teacher is None else teacher.flat()


def target_log_probs(logits: Tensor | Final, targets: Tensor) -> Tensor:
    """Log-probability [B, T] of each target, 0 where there is none; no graph, a slice of tokens at once.

    Args:
        logits: [B, T, V], or what a head makes them of.
        targets: [B, T] int64 from `next_targets`.
    """
    if isinstance(logits, Final):
        return final_log_probs(logits, targets, targets != IGNORED)
    flat, flat_targets = logits.detach().flatten(0, 1), targets.flatten()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, SLICE_ELEMENTS // logits.shape[-1])
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        pieces = [
            -F.cross_entropy(
                flat[start : start + step].to(dtype),
                flat_targets[start : start + step],
                reduction="none",
                ignore_index=IGNORED,
            )
            for start in range(0, len(flat), step)
        ]
    return torch.cat(pieces).view_as(targets)
