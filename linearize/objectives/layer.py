"""One layer's training step: every layer objective evaluated, its gradient taken, nothing kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from linearize.objectives.base import OBJECTIVES, BlockObjective, Call, OutputObjective, take_gradient


def layer_backward(call: Call, objectives: Mapping[str, float], scale: float = 1.0) -> Tensor:
    """Add the gradient of ``scale * sum(weight * loss)`` of one layer to its mixer's parameters.

    Objectives on the output share one `call.student()` and one backward pass; the others go block by block.
    The graph is freed before this returns. The forward pass runs in the ambient autocast, losses in float32,
    gradients outside autocast.

    Args:
        call: the layer's tensors.
        objectives: objective name -> weight.
        scale: further factor on the gradient alone, for example 1 / (layers * accumulation steps).

    Returns:
        Scalar float32 tensor on the call's device: ``sum(weight * loss)`` without `scale`, detached.
    """
    total = torch.zeros(
        (), dtype=torch.promote_types(call.teacher.dtype, torch.float32), device=call.teacher.device
    )
    shared: list[tuple[OutputObjective, float]] = []
    for name, weight in objectives.items():
        objective = OBJECTIVES.get(name)()
        if isinstance(objective, OutputObjective):
            shared.append((objective, weight))
        else:
            assert isinstance(objective, BlockObjective), f"objective '{name}' is not of a layer"
            total = total + weight * objective.backward(call, scale * weight)
    if shared:
        with torch.enable_grad():
            loss = joined(shared, call, call.student())
            with torch.autocast(call.teacher.device.type, enabled=False):
                take_gradient(scale * loss)
        total = total + loss.detach()
    return total


def joined(shared: list[tuple[OutputObjective, float]], call: Call, student: Tensor) -> Tensor:
    """sum(weight * loss) of objectives on a layer's output [B, T, H, V]; a function alone, so that it can be compiled.

    Operation by operation it goes a dozen times over the text in float32.
    """
    return torch.stack([weight * objective.loss(call, student) for objective, weight in shared]).sum()


def masked_mean(per_token: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of [B, T] over the valid positions; 0 where there is none."""
    if valid is None:
        return per_token.mean()
    mask = valid.to(per_token.dtype)
    # where, not a product: what a mixer computes at padding may be infinite.
    return torch.where(valid, per_token, 0.0).sum() / mask.sum().clamp_min(1.0)


def widen(x: Tensor) -> Tensor:
    """In float32, or unchanged when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
