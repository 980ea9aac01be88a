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
        direction: [..., H, F] of the next step, in the dtype that H is multiplied in, times `scale(size)`.
        size: [..., H] of `rest`, squared.
    """

    x: Tensor
    rest: Tensor
    direction: Tensor
    size: Tensor


def scale(size: Tensor) -> Tensor:
    """The power of two [..., H, 1] that brings a direction of squared length `size` to a length of about one.

    What is left shrinks with every step. In float16 its directions would soon lie below the smallest number, 6e-8, and
    what is left of them lead further away with each step.
    """
    return torch.exp2(-torch.floor(0.5 * torch.log2(size + torch.finfo(size.dtype).tiny)))[..., None]


def begun(target: Tensor, dtype: torch.dtype) -> Solving:
    """At zero. target [..., H, F], float32 or wider; dtype: of directions."""
    size = target.square().sum(-1)
    return Solving(torch.zeros_like(target), target, (scale(size) * target).to(dtype), size)


def step_reference(solving: Solving, made: Tensor, ridge: Tensor) -> Solving:
    """One step; see `chunk.conjugate_step`."""
    x, rest, direction, size = solving
    tiny, before = torch.finfo(rest.dtype).tiny, scale(size)
    along = direction.to(rest.dtype)
    turned = made.to(rest.dtype) + along * ridge.to(rest.dtype)
    # once solved, all that is left is rounding, which may say anything of the direction
    least = LOWEST * along.square().sum(-1)
    length = (size / (torch.maximum((along * turned).sum(-1), least) + tiny))[..., None] * before
    x, rest = x + length * along, rest - length * turned
    after = rest.square().sum(-1)
    along = rest + (after / (size + tiny))[..., None] / before * along
    return Solving(x, rest, (scale(after) * along).to(direction.dtype), after)


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
