"""The definition: conjugate gradients (Hestenes and Stiefel 1952) by steps of plain torch, in any float dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = 0.25
"""No eigenvalue of a system is below; what stands on the diagonal is at least that, as in MesaNet."""


class Solving(NamedTuple):
    """Where the systems of all rows are.

    Attributes:
        x: [..., H, F] the solution so far, float32 or wider.
        rest: [..., H, F] what it leaves of the target.
        direction: [..., H, F] of the next step, in the dtype that H is multiplied in.
        size: [..., H] of `rest`, squared.
    """

    x: Tensor
    rest: Tensor
    direction: Tensor
    size: Tensor


def begun(target: Tensor, dtype: torch.dtype) -> Solving:
    """At zero. target [..., H, F], float32 or wider; dtype: of directions."""
    return Solving(torch.zeros_like(target), target, target.to(dtype), target.square().sum(-1))


def step_reference(solving: Solving, made: Tensor, ridge: Tensor) -> Solving:
    """One step; see `chunk.conjugate_step`."""
    x, rest, direction, size = solving
    tiny = torch.finfo(rest.dtype).tiny
    along = direction.to(rest.dtype)
    turned = made.to(rest.dtype) + along * ridge.to(rest.dtype)
    # once solved, all that is left is rounding, which may say anything of the direction
    least = LOWEST * along.square().sum(-1)
    length = (size / (torch.maximum((along * turned).sum(-1), least) + tiny))[..., None]
    x, rest = x + length * along, rest - length * turned
    after = rest.square().sum(-1)
    along = rest + (after / (size + tiny))[..., None] * along
    return Solving(x, rest, along.to(direction.dtype), after)


def conjugate_reference(
    times: Callable[[Tensor], Tensor], target: Tensor, ridge: Tensor, steps: int, dtype: torch.dtype
) -> Tensor:
    """x with (H + diag(ridge)) x = target after so many steps from zero.

    Args:
        times: multiplies [..., H, F] in `dtype` by H, which is symmetric and has no eigenvalue below zero.
        target: [..., H, F], float32 or wider.
        ridge: [H, F], at least `LOWEST`.
        steps: as many as F, or more, are as good as exact but for rounding.
        dtype: directions are rounded to it first, so that all sums are of the same direction.
    """
    solving = begun(target, dtype)
    for _ in range(steps):
        solving = step_reference(solving, times(solving.direction), ridge)
    return solving.x
