"""Every token's own system: all steps in one launch, or one of them between two products with all of the matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.conjugate.reference import Solving, begun, step_reference
from linearize.kernels.gated_linear import gated_linear_chunk


def conjugate_chunk(
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    docs: Tensor | None,
    before: Tensor | None,
    target: Tensor,
    ridge: Tensor,
    steps: int,
) -> Tensor:
    """x [B, T, H, F] with (H_t + diag(ridge)) x_t = target_t by so many steps from zero, no gradient.

    H_t is the decayed sum of key value^T so far, and symmetric: values are multiples of their keys. No H_t is written
    down. In Triton (F at most 128, in float32 64) a program has 64 tokens of a head with their keys and the state
    before them, and takes all steps: the text is read once, where one step after the other reads and writes it as often
    as there are steps. Elsewhere, and for wider heads, each step is linear attention and a `conjugate_step`.

    Args:
        keys, values: [B, T, M, F] of one dtype, in which directions are multiplied.
        log_decay: [B, T, M] or None.
        docs: [B, T] document numbers, non-decreasing, of which 0 goes on from `before`; None for one.
        before: [B, M, F, F], symmetric, or None for nothing.
        target: [B, T, H, F]; the solution is float32, or wider where this is.
        ridge: [H, F], at least `LOWEST`.
        steps: as many as F, or more, are as good as exact but for rounding.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(keys, values, target):
        from linearize.kernels.conjugate.operator import chunk_triton, holds

        if holds(keys, target):
            return chunk_triton(keys, values, log_decay, docs, before, target, ridge, steps)
    solving = begun(target.to(torch.promote_types(target.dtype, torch.float32)), keys.dtype)
    state = None if before is None else (before, None)
    for _ in range(steps):
        made, *_ = gated_linear_chunk(
            solving.direction, keys, values, log_decay, docs, state, normalize=False
        )
        solving = conjugate_step(solving, made, ridge)
    return solving.x


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
