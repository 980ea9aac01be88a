"""distill as a torch custom operator: losses and gradients in one go, so that no graph holds logits."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.distill.slices import Job, Side, slices


@torch.library.custom_op("linearize::distill", mutates_args=())
def distill(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor | None, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, targets: Tensor, weights: Tensor, numbers: list[float], needs: list[bool],
    dtype: torch.dtype, at_once: int,
) -> list[Tensor]:  # fmt: skip
    """The loss, then its gradients in hidden, weight and bias, empty where `needs` says no. See `distill_loss`."""
    student = Side(hidden.to(dtype), weight.to(dtype), _cast(bias, dtype))
    other = None
    if teacher is not None and teacher_weight is not None:
        other = Side(
            teacher.to(dtype), _shared(teacher_weight, weight, student, dtype), _cast(teacher_bias, dtype)
        )
    losses = _losses(hidden, dtype)
    found = _outputs(hidden, weight, bias, needs, dtype)
    for_hidden, for_weight, for_bias = found
    for x in (for_weight, for_bias):
        x.zero_()
    job = Job(*numbers)
    with torch.autocast(hidden.device.type, enabled=False):
        for piece, gradient in slices(
            student, other, targets, weights, losses, job, at_once=at_once, gradient=any(needs)
        ):
            if needs[0]:
                torch.mm(gradient, student.weight, out=for_hidden[piece])
            if needs[1]:
                for_weight += gradient.t() @ student.hidden[piece]
            if needs[2]:
                for_bias += gradient.sum(0, dtype=for_bias.dtype)
    to = (hidden, weight, weight if bias is None else bias)
    return [losses.sum(), *(x.to(like.dtype) for x, like in zip(found, to, strict=True))]


def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, numbers: list[float],
    dtype: torch.dtype, at_once: int,
) -> Tensor:  # fmt: skip
    """Each token's weighted loss [N] against its target; no graph."""
    student = Side(hidden.to(dtype), weight.to(dtype), _cast(bias, dtype))
    losses = _losses(hidden, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for _ in slices(
            student, None, targets, weights, losses, Job(*numbers), at_once=at_once, gradient=False
        ):
            pass
    return losses


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _shared(theirs: Tensor, own: Tensor, student: Side, dtype: torch.dtype) -> Tensor:
    """The teacher's matrix in the compute dtype: the student's cast where both have one head."""
    same = theirs.data_ptr() == own.data_ptr() and theirs.shape == own.shape and theirs.dtype == own.dtype
    return student.weight if same else theirs.to(dtype)


def _losses(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32))


def _outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients: the head's are sums, in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0, dtype=dtype),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=wide),
        weight.new_empty(bias.shape if bias is not None and needs[2] else 0, dtype=wide),
    )


@distill.register_fake
def _(
    hidden,
    weight,
    bias,
    teacher,
    teacher_weight,
    teacher_bias,
    targets,
    weights,
    numbers,
    needs,
    dtype,
    at_once,
):
    found = _outputs(hidden, weight, bias, needs, dtype)
    to = (hidden, weight, weight if bias is None else bias)
    loss = hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    return [loss, *(x.to(like.dtype) for x, like in zip(found, to, strict=True))]


def _setup(ctx, inputs, output) -> None:
    ctx.needs = inputs[9]
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grads):
    slope = grads[0]
    found = [
        (x * slope).to(x.dtype) if needed else None
        for x, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return (*found, *(None for _ in range(9)))


distill.register_autograd(_backward, setup_context=_setup)
