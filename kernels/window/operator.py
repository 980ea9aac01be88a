"""The window as torch custom operators over the Triton kernels: shapes checked, kernels launched, gradients wired."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window.plan import WIDEST, make_plan, outputs
from linearize.kernels.window.seen import Seen


def window_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    *,
    scaling: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
    wants_top: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Softmax over the keys that each query sees, normalized, and what joins it to another branch.

    With numerator n, denominator d and maximum m of `window_chunk`: out = n / d, log of the sum m + log d, and m.
    Keys are taken in tiles, so that memory hangs on no window's length; grouped heads are not repeated.

    Args:
        q: [B, T, H, K].
        k, v: [B, P + T, N, K or V] in the dtype of q.
        sink: [H] or None, a logit that takes weight and gives no value.
        wants_top: give the maximum, through which gradients go.

    Returns:
        out [B, T, H, V] in the dtype of q; log of the sum of weights [B, T, H] float32, -inf where nothing is seen;
        the largest score [B, T, H] float32, zero where nothing is seen, or None.

    Raises:
        KernelError: the kernels do not cover the call.
    """
    covered(q, k, v)
    numbers = [seen.window, seen.prefix, seen.pins if seen.pin is not None else 0, scaling, softcap or 0.0]
    made = forward(q, k, v, seen.first, seen.pin, sink, [float(x) for x in (*numbers, wants_top)])
    return made[0], made[1], made[2] if wants_top else None


def covered(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    dispatch.require(
        "window",
        dtype=(
            q.dtype in kinds and q.dtype == k.dtype == v.dtype,
            f"{q.dtype}, {k.dtype}, {v.dtype}: one of {kinds}",
        ),
        key_dim=(k.shape[-1] <= WIDEST, f"{k.shape[-1]} must be at most {WIDEST}"),
        value_dim=(v.shape[-1] <= WIDEST, f"{v.shape[-1]} must be at most {WIDEST}"),
        heads=(
            q.shape[2] % k.shape[2] == 0,
            f"{q.shape[2]} must be a multiple of {k.shape[2]} key-value heads",
        ),
    )


@torch.library.custom_op("linearize::window", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, pin: Tensor | None, sink: Tensor | None,
    numbers: list[float],
) -> list[Tensor]:  # fmt: skip
    """out, log of the sum, largest score and its key; numbers: window, prefix, pins, scaling, cap, wants_top."""
    from linearize.kernels.window.launches import launch_forward

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    sink = None if sink is None else sink.contiguous()
    return launch_forward(make_plan(q, k, v, numbers), q, k, v, _runs(first, pin), sink)


@forward.register_fake
def _(q, k, v, first, pin, sink, numbers):
    return outputs(make_plan(q, k, v, numbers), q)


@torch.library.custom_op("linearize::window_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, pin: Tensor | None, saved: list[Tensor],
    dout: Tensor, dlog_sum: Tensor | None, dtop: Tensor | None, numbers: list[float],
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv and each row's shift."""
    from linearize.kernels.window.launches import launch_backward

    plan = make_plan(q, k, v, numbers)
    q, k, v, dout = (x.contiguous() for x in (q, k, v, dout))
    dlog_sum, dtop = (None if x is None else x.contiguous() for x in (dlog_sum, dtop))
    out, log_sum, place = saved
    return launch_backward(plan, q, k, v, _runs(first, pin), (out, log_sum, place), (dout, dlog_sum, dtop))


@backward.register_fake
def _(q, k, v, first, pin, saved, dout, dlog_sum, dtop, numbers):
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return [*made, torch.empty_like(saved[1])]


def _runs(first: Tensor | None, pin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    first, pin = (None if x is None else x.to(torch.int32).contiguous() for x in (first, pin))
    return first, pin


def _setup(ctx, inputs, output) -> None:
    q, k, v, first, pin, sink, numbers = inputs
    out, log_sum, _, place = output
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, first, pin, sink, out, log_sum, place)


def _backward(ctx, grads):
    q, k, v, first, pin, sink, out, log_sum, place = ctx.saved_tensors
    dout, dlog_sum, dtop, _ = grads
    if dout is None and dlog_sum is None and dtop is None:
        return (None,) * 7
    wants_top = bool(ctx.numbers[-1])
    dout = torch.zeros_like(out) if dout is None else dout
    dtop = torch.zeros_like(log_sum) if wants_top and dtop is None else dtop
    saved = [out, log_sum, place]
    dq, dk, dv, shift = backward(
        q, k, v, first, pin, saved, dout, dlog_sum, dtop if wants_top else None, ctx.numbers
    )
    dsink = None
    if sink is not None and ctx.needs_input_grad[5]:
        # a key whose value is zero: its weight times (0 - shift), and the maximum where it is the sink's
        own = -(sink.float() - log_sum).exp() * shift
        if wants_top:
            own = own + torch.where(place < 0, dtop, 0.0)
        dsink = own.sum((0, 1)).to(sink.dtype)
    return dq, dk, dv, None, None, dsink, None


forward.register_autograd(_backward, setup_context=_setup)
