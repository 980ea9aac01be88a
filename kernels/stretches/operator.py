"""Stretches in chunks as torch custom operators over the Triton kernels: shapes checked, gradients wired."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.stretches.chunk import Stretches, bounds, widest
from linearize.kernels.stretches.plan import CHUNK, make_plan


def stretches_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    shares: Tensor,
    place: Tensor,
    docs: Tensor,
    stretches: Stretches,
    before: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """See `chunk.stretches_chunk`. Head dims that are no power of two are filled up with zeros."""
    covered(q, k, v, beta, log_decay)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    for_key, for_value = (max(16, 1 << (width - 1).bit_length()) - width for width in (key_dim, value_dim))
    if for_key:
        q, k = F.pad(q, (0, for_key)), F.pad(k, (0, for_key))
    if for_value:
        v = F.pad(v, (0, for_value))
    start = None if state is None else state.transpose(1, 2).float()
    if start is not None and (for_key or for_value):
        start = F.pad(start, (0, for_value, 0, for_key))
    limits = bounds(place, before, CHUNK, max(1, -(-place.shape[1] // CHUNK)))
    numbers = [stretches.block.bit_length() - 1, stretches.levels, int(stretches.older)]
    out, final = forward(
        q, k, v, beta, log_decay, shares.float(), place.clamp_min(0).to(torch.int32), limits.to(torch.int32), docs,
        start, numbers,
    )  # fmt: skip
    out = out[..., :value_dim] if for_value else out
    if state is None:
        return out, None
    return out, final[..., :key_dim, :value_dim].transpose(1, 2)


def covered(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    most = widest(q.dtype)
    gates = [x for x in (beta, log_decay) if x is not None]
    dispatch.require(
        "stretches",
        dtype=(
            q.dtype in kinds and q.dtype == k.dtype == v.dtype,
            f"{q.dtype}, {k.dtype}, {v.dtype}: one of {kinds}",
        ),
        gates=(
            all(x.dtype in kinds for x in gates),
            f"{[x.dtype for x in gates]}: beta and log_decay as one of {kinds}",
        ),
        log_decay=(
            log_decay is None or log_decay.dim() == 3,
            f"{None if log_decay is None else tuple(log_decay.shape)}: one a head, not one a key dimension",
        ),
        key_dim=(k.shape[-1] <= most, f"{k.shape[-1]} must be at most {most} in {q.dtype}"),
        value_dim=(v.shape[-1] <= most, f"{v.shape[-1]} must be at most {most} in {q.dtype}"),
        heads=(
            q.shape[2] % k.shape[2] == 0,
            f"{q.shape[2]} must be a multiple of {k.shape[2]} heads of the state",
        ),
    )


@torch.library.custom_op("linearize::stretches", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, shares: Tensor, place: Tensor,
    bounds: Tensor, docs: Tensor, start: Tensor | None, numbers: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and, where there is a `start`, the final state; `numbers` are bits of a block, levels and older."""
    from linearize.kernels.stretches.launches import launch_forward

    plan = make_plan(q, k, v, beta, shares, numbers)
    given = _inputs(q, k, v, beta, log_decay, shares, place, bounds, docs, start)
    return launch_forward(plan, given, wants_final=start is not None)


@forward.register_fake
def _(q, k, v, beta, log_decay, shares, place, bounds, docs, start, numbers):
    plan = make_plan(q, k, v, beta, shares, numbers)
    size = (0,) if start is None else plan.state_size()
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(size, dtype=torch.float32)


def _inputs(q, k, v, beta, log_decay, shares, place, bounds, docs, start):
    from linearize.kernels.stretches.launches import Inputs

    q, k, v, shares, place, bounds = (x.contiguous() for x in (q, k, v, shares, place, bounds))
    beta, log_decay, start = (None if x is None else x.contiguous() for x in (beta, log_decay, start))
    docs = docs.to(torch.int32).contiguous()
    return Inputs(q, k, v, beta, log_decay, shares, place, bounds, docs, start)


@torch.library.custom_op("linearize::stretches_backward", mutates_args=())
def backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None,
    log_decay: Tensor | None, shares: Tensor, place: Tensor, bounds: Tensor, docs: Tensor, start: Tensor | None,
    numbers: list[int],
) -> list[Tensor]:  # fmt: skip
    """Of q, k, v, beta, log_decay, shares and start; nothing for what is not there."""
    from linearize.kernels.stretches.launches import launch_backward

    plan = make_plan(q, k, v, beta, shares, numbers)
    given = _inputs(q, k, v, beta, log_decay, shares, place, bounds, docs, start)
    dfinal = None if dfinal is None else dfinal.contiguous()
    found = launch_backward(plan, given, do.contiguous(), dfinal)
    made = (found.q, found.k, found.v, found.beta, found.log_decay, found.shares, found.start)
    nothing = q.new_empty(0)
    of = (q, k, v, beta, log_decay, shares, start)
    return [
        nothing.clone() if x is None or like is None else x.to(like.dtype)
        for x, like in zip(made, of, strict=True)
    ]


@backward.register_fake
def _(do, dfinal, q, k, v, beta, log_decay, shares, place, bounds, docs, start, numbers):
    return [
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, beta, log_decay, shares, start)
    ]


def _setup(ctx, inputs, output) -> None:
    *tensors, numbers = inputs
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, do, dfinal):
    q, k, v, beta, log_decay, shares, place, limits, docs, start = ctx.saved_tensors
    if do is None:
        do = v.new_zeros(*q.shape[:3], v.shape[-1])
    if start is None:
        dfinal = None
    found = backward(do, dfinal, q, k, v, beta, log_decay, shares, place, limits, docs, start, ctx.numbers)
    dq, dk, dv, dbeta, dlog_decay, dshares, dstart = found
    return (
        dq, dk, dv, None if beta is None else dbeta, None if log_decay is None else dlog_decay, dshares, None, None,
        None, None if start is None else dstart, None,
    )  # fmt: skip


forward.register_autograd(_backward, setup_context=_setup)
