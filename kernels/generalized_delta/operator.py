"""generalized_delta as torch custom operators over the Triton kernels: shapes checked, launched, gradients wired."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.generalized_delta.plan import gradients, make_plan, outputs


def generalized_delta_triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, docs: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See `chunk.generalized_delta_chunk`. Widths that are no power of two are filled up with zeros."""
    covered(q, k, v, a, b, log_decay)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    for_key, for_value = (_extra(x) for x in (key_dim, value_dim))
    state = state.float()
    if for_key:
        q, k, a, b, log_decay = (F.pad(x, (0, for_key)) for x in (q, k, a, b, log_decay))
    if for_value:
        v = F.pad(v, (0, for_value))
    if for_key or for_value:
        state = F.pad(state, (0, for_value, 0, for_key))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, a, b, log_decay, state))
    out, final, *_ = forward(q, k, v, a, b, log_decay, docs, state, save)
    if for_key or for_value:
        # contiguous, as the one-token form writes it in place
        return out[..., :value_dim], final[:, :, :key_dim, :value_dim].contiguous()
    return out, final


def covered(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    given = [x.dtype for x in (q, k, v, a, b)]
    widest = 128 if q.dtype == torch.float32 else 256
    dispatch.require(
        "generalized_delta",
        dtype=(
            given[0] in kinds and len(set(given)) == 1,
            f"{given}: q, k, v, a and b alike, one of {kinds}",
        ),
        log_decay=(log_decay.dtype in kinds, f"{log_decay.dtype} is none of {kinds}"),
        key_dim=(k.shape[-1] <= widest, f"{k.shape[-1]} must be at most {widest} in {q.dtype}"),
        value_dim=(v.shape[-1] <= widest, f"{v.shape[-1]} must be at most {widest} in {q.dtype}"),
        heads=(
            q.shape[2] % k.shape[2] == 0,
            f"{q.shape[2]} must be a multiple of {k.shape[2]} heads of the state",
        ),
    )


def _extra(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length()) - width


@torch.library.custom_op("linearize::generalized_delta", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    docs: Tensor,
    start: Tensor,
    save: bool,
) -> list[Tensor]:
    """out, final state, and where `save` says so what backward reuses; see `plan.outputs`."""
    from linearize.kernels.generalized_delta.launches import launch_forward

    q, k, v, a, b, log_decay, start = (x.contiguous() for x in (q, k, v, a, b, log_decay, start))
    docs = docs.to(torch.int32).contiguous()
    return launch_forward(make_plan(q, k, v), q, k, v, a, b, log_decay, docs, start, save)


@forward.register_fake
def _(q, k, v, a, b, log_decay, docs, start, save):
    return outputs(make_plan(q, k, v), q, save)


@torch.library.custom_op("linearize::generalized_delta_backward", mutates_args=())
def backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor,
    docs: Tensor, saved: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """See `plan.gradients`."""
    from linearize.kernels.generalized_delta.launches import launch_backward

    dfinal = None if dfinal is None else dfinal.contiguous()
    do, q, k, v, a, b, log_decay = (x.contiguous() for x in (do, q, k, v, a, b, log_decay))
    docs = docs.to(torch.int32).contiguous()
    return launch_backward(make_plan(q, k, v), do, dfinal, q, k, v, a, b, log_decay, docs, saved)


@backward.register_fake
def _(do, dfinal, q, k, v, a, b, log_decay, docs, saved):
    return gradients(make_plan(q, k, v), (q, k, v, a, b, log_decay))


def _setup(ctx, inputs, output) -> None:
    # without this, autograd would fill gradients of what is saved with zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[2:])


def _backward(ctx, grads):
    q, k, v, a, b, log_decay, docs, *saved = ctx.saved_tensors
    do, dfinal = grads[:2]
    if do is None:
        do = v.new_zeros(*q.shape[:3], v.shape[-1])
    dq, dk, dv, da, db, dlog_decay, dstart = backward(do, dfinal, q, k, v, a, b, log_decay, docs, saved)
    return dq, dk, dv, da, db, dlog_decay, None, dstart, None


forward.register_autograd(_backward, setup_context=_setup)
