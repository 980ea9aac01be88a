"""One token: its matrix is at hand, so the whole solution is one launch."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.conjugate.reference import conjugate_reference


def conjugate_solve(matrix: Tensor, target: Tensor, ridge: Tensor, steps: int) -> Tensor:
    """x [B, H, F] with (H_m + diag(ridge)) x = target by so many steps from zero, no gradient.

    Args:
        matrix: [B, M, F, F] symmetric, no eigenvalue below zero; query head h reads matrix h // (H / M).
        target: [B, H, F], float32 or wider.
        ridge: [H, F], at least `LOWEST`.
        steps: as many as F, or more, are as good as exact but for rounding.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(matrix, target, ridge):
        from linearize.kernels.conjugate.operator import solve, solves

        if solves(target) or not dispatch.automatic():
            return solve(matrix.contiguous(), target.contiguous(), ridge.to(target.dtype).contiguous(), steps)
    heads = matrix.shape[1]
    wide = matrix.to(target.dtype)

    def times(x: Tensor) -> Tensor:
        return (x.unflatten(1, (heads, -1)) @ wide).flatten(1, 2)

    return conjugate_reference(times, target, ridge, steps, target.dtype)
