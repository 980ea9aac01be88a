"""gated_delta with a decay for every key dimension as torch custom operators over its Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.gated_delta.key_plan import key_outputs
from linearize.kernels.gated_delta.plan import gradients, make_plan


@torch.library.custom_op("linearize::gated_delta_key", mutates_args=())
def key_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, docs: Tensor, start: Tensor
) -> list[Tensor]:
    """out, final state, and what backward reuses; see `key_plan.key_outputs`."""
    from linearize.kernels.gated_delta.key_launches import launch_key_forward

    q, k, v, beta, log_decay, start = (x.contiguous() for x in (q, k, v, beta, log_decay, start))
    docs = docs.to(torch.int32).contiguous()
    return launch_key_forward(make_plan(q, k, v), q, k, v, beta, log_decay, docs, start)


@key_forward.register_fake
def _(q, k, v, beta, log_decay, docs, start):
    return key_outputs(make_plan(q, k, v), q)


@torch.library.custom_op("linearize::gated_delta_key_backward", mutates_args=())
def key_backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor,
    docs: Tensor, saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `plan.gradients`."""
    from linearize.kernels.gated_delta.key_launches import launch_key_backward

    dfinal = None if dfinal is None else dfinal.contiguous()
    do, q, k, v, beta, log_decay = (x.contiguous() for x in (do, q, k, v, beta, log_decay))
    docs = docs.to(torch.int32).contiguous()
    return launch_key_backward(make_plan(q, k, v), do, dfinal, q, k, v, beta, log_decay, docs, saved)


@key_backward.register_fake
def _(do, dfinal, q, k, v, beta, log_decay, docs, saved):
    return gradients(make_plan(q, k, v), q, k, v, beta, log_decay)


def _setup(ctx, inputs, output) -> None:
    *inputs, _ = inputs
    # without this, autograd would fill gradients of T, P and the states with zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[2:])


def _backward(ctx, grads):
    do, dfinal, *_ = grads
    q, k, v, beta, log_decay, docs, *saved = ctx.saved_tensors
    if do is None:
        do = v.new_zeros(*q.shape[:3], v.shape[-1])
    dq, dk, dv, dbeta, dlog_decay, dstart = key_backward(do, dfinal, q, k, v, beta, log_decay, docs, saved)
    return dq, dk, dv, dbeta, dlog_decay, None, dstart


key_forward.register_autograd(_backward, setup_context=_setup)
