"""One step of every token's system, between two launches of the operator that multiplies by all of their matrices."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.conjugate.reference import Solving, step_reference


def conjugate_step(solving: Solving, made: Tensor, ridge: Tensor) -> Solving:
    """A step of conjugate gradients on (H + diag(ridge)) x = target for each row, no gradient.

    In torch a step is a dozen passes over memory, in Triton one.

    Args:
        solving: from `begun` or from the step before.
        made: [..., H, F], H times `solving.direction`, in any float dtype.
        ridge: [H, F].

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(solving.rest, made, ridge):
        from linearize.kernels.conjugate.operator import covered, step

        covered(solving.rest)
        parts = [each.contiguous() for each in (made, ridge.to(solving.rest.dtype), *solving)]
        return Solving(*step(*parts))
    return step_reference(solving, made, ridge)
