"""gated_delta as torch custom operators over the Triton kernels: shapes checked, kernels launched, gradients wired."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_delta.key_operator import key_forward
from linearize.kernels.gated_delta.plan import Six, gradients, make_plan, outputs


def delta_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    docs: Tensor,
    state: Tensor,
    *,
    keeps: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `chunk.delta_chunk`. Head dims that are no power of two are filled up with zeros: no product changes."""
    covered(q, k, v, beta, log_decay)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    for_key, for_value = (_extra(x) for x in (key_dim, value_dim))
    state = state.float()
    if for_key:
        q, k = F.pad(q, (0, for_key)), F.pad(k, (0, for_key))
    if for_value:
        v = F.pad(v, (0, for_value))
    if for_key or for_value:
        state = F.pad(state, (0, for_value, 0, for_key))
    if log_decay is not None and log_decay.dim() == 4:
        log_decay = F.pad(log_decay, (0, for_key)) if for_key else log_decay
        out, final, *_ = key_forward(q, k, v, beta, log_decay, docs, state)
    else:
        out, final, *_ = forward(q, k, v, beta, log_decay, docs, state, keeps)
    if for_key or for_value:
        # contiguous, as the one-token form writes it in place
        return out[..., :value_dim], final[:, :, :key_dim, :value_dim].contiguous()
    return out, final


def covered(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    widest = 128 if q.dtype == torch.float32 else 256
    gates = [beta] if log_decay is None else [beta, log_decay]
    dispatch.require(
        "gated_delta",
        dtype=(
            q.dtype in kinds and q.dtype == k.dtype == v.dtype,
            f"{q.dtype}, {k.dtype}, {v.dtype}: one of {kinds}",
        ),
        gates=(
            all(x.dtype in kinds for x in gates),
            f"{[x.dtype for x in gates]}: beta and log_decay as one of {kinds}",
        ),
        key_dim=(k.shape[-1] <= widest, f"{k.shape[-1]} must be at most {widest} in {q.dtype}"),
        value_dim=(v.shape[-1] <= widest, f"{v.shape[-1]} must be at most {widest} in {q.dtype}"),
        log_decay=(
            log_decay is None or log_decay.dim() == 3 or log_decay.shape == k.shape,
            f"{None if log_decay is None else tuple(log_decay.shape)} must be {tuple(beta.shape)} or {tuple(k.shape)}",
        ),
        heads=(
            q.shape[2] % k.shape[2] == 0,
            f"{q.shape[2]} must be a multiple of {k.shape[2]} heads of the state",
        ),
    )


def _extra(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length()) - width


@torch.library.custom_op("linearize::gated_delta", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    docs: Tensor,
    start: Tensor,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, final state, and what backward reuses, see `plan.outputs`: nothing where it `keeps` none of it."""
    from linearize.kernels.gated_delta.launches import launch_forward

    decays = None if log_decay is None else log_decay.contiguous()
    q, k, v, beta, start = (x.contiguous() for x in (q, k, v, beta, start))
    docs = docs.to(torch.int32).contiguous()
    made = launch_forward(make_plan(q, k, v), q, k, v, beta, decays, docs, start)
    return made if keeps else _without(made)


@forward.register_fake
def _(q, k, v, beta, log_decay, docs, start, keeps):
    made = outputs(make_plan(q, k, v), q)
    return made if keeps else _without(made)


def _without(made: Six) -> Six:
    """`plan.outputs` of which backward has nothing."""
    out, final, *rest = made
    inverse, kept, removal, states = (x.new_empty(0) for x in rest)
    return out, final, inverse, kept, removal, states


@torch.library.custom_op("linearize::gated_delta_backward", mutates_args=())
def backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    docs: Tensor, start: Tensor | None, inverse: Tensor, kept: Tensor, removal: Tensor, states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `plan.gradients`; with a `start` what forward did not keep is made again."""
    from linearize.kernels.gated_delta.launches import launch_backward, launch_states_of_chunks

    decays = None if log_decay is None else log_decay.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    do, q, k, v, beta = (x.contiguous() for x in (do, q, k, v, beta))
    docs = docs.to(torch.int32).contiguous()
    plan = make_plan(q, k, v)
    if start is not None:
        final, inverse, kept, removal, states = outputs(plan, q)[1:]
        launch_states_of_chunks(
            plan, k, v, beta, decays, docs, start.contiguous(), final, inverse, kept, removal, states
        )
    return launch_backward(plan, do, dfinal, q, k, v, beta, decays, docs, inverse, kept, removal, states)


@backward.register_fake
def _(do, dfinal, q, k, v, beta, log_decay, docs, start, inverse, kept, removal, states):
    return gradients(make_plan(q, k, v), q, k, v, beta, log_decay)


def _setup(ctx, inputs, output) -> None:
    q, k, v, beta, log_decay, docs, start, keeps = inputs
    # without this, autograd would fill gradients of T, P and the states with zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, log_decay, docs, None if keeps else start, *output[2:])


def _backward(ctx, do, dfinal, *_):
    q, k, v, beta, log_decay, docs, start, *saved = ctx.saved_tensors
    if do is None:
        do = v.new_zeros(*q.shape[:3], v.shape[-1])
    found = backward(do, dfinal, q, k, v, beta, log_decay, docs, start, *saved)
    dq, dk, dv, dbeta, dlog_decay, dstart = found
    return dq, dk, dv, dbeta, None if log_decay is None else dlog_decay, None, dstart, None


forward.register_autograd(_backward, setup_context=_setup)
