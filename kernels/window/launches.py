"""The launches of the window, forward and backward, in order."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.launch import launch
from linearize.kernels.window.plan import SEGMENT, Plan, constants, outputs, sizes
from linearize.kernels.window.triton_forward import forward_kernel
from linearize.kernels.window.triton_keys import key_kernel, segment_kernel
from linearize.kernels.window.triton_queries import query_kernel

Runs = tuple[Tensor | None, Tensor | None]
"""`first` and `pin` of `Seen`."""


def launch_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, runs: Runs, sink: Tensor | None
) -> list[Tensor]:
    """`plan.outputs`, filled."""
    out, log_sum, top, place = made = outputs(plan, q)
    tile = sizes("forward", plan)
    launch(
        forward_kernel, (plan.batch * plan.heads * -(-plan.tokens // tile["M"]),),
        q=q, k=k, v=v, sink=sink, out=out, log_sum=log_sum, top_out=top, place_out=place,
        HAS_SINK=sink is not None, **_seen(plan, runs), **constants(plan), **tile,
    )  # fmt: skip
    return made


def launch_backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Runs,
    saved: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
) -> list[Tensor]:
    """dq, dk, dv, and each row's shift [B, T, H] float32: do . o less the gradient of the log of the sum.

    Args:
        saved: out, log of the sum, place of the largest score.
        gradients: of out, of the log of the sum, of the largest score.
    """
    out, log_sum, place = saved
    dout, dlog_sum, dtop = gradients
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shift = torch.empty_like(log_sum)
    seen, fixed = _seen(plan, runs), constants(plan)
    tile = sizes("query", plan)
    launch(
        query_kernel, (plan.batch * plan.heads * -(-plan.tokens // tile["M"]),),
        q=q, k=k, v=v, out=out, log_sum=log_sum, place=place, dout=dout, dlog_sum=dlog_sum, dtop=dtop, dq=dq,
        shift_out=shift, HAS_SUM=dlog_sum is not None, **seen, **fixed, **tile,
    )  # fmt: skip
    tile = sizes("key", plan)
    inputs = {
        "q": q, "k": k, "v": v, "log_sum": log_sum, "place": place, "shift": shift, "dout": dout, "dtop": dtop,
        "segments": plan.segments, "SEGMENT": SEGMENT,
    }  # fmt: skip
    later_k = later_v = None
    if plan.pins and plan.segments > 1:
        size = (plan.batch, plan.segments, plan.kv_heads, plan.pins)
        later_k = q.new_empty(*size, plan.key_dim, dtype=torch.float32)
        later_v = q.new_empty(*size, plan.value_dim, dtype=torch.float32)
        # few pinned keys make a narrow tile: most of a block's rows would be nobody's
        narrow = tile | {"N": min(tile["N"], 16 if plan.pins <= 16 else 64)}
        narrow["num_warps"] = 2 if max(plan.key_dim, plan.value_dim) <= 64 else 8
        programs = plan.batch * plan.kv_heads * plan.segments * -(-plan.pins // narrow["N"])
        launch(
            segment_kernel, (programs,), later_k=later_k, later_v=later_v, **inputs, **seen, **fixed, **narrow
        )
    launch(
        key_kernel, (plan.batch * plan.kv_heads * -(-(plan.prefix + plan.tokens) // tile["N"]),),
        later_k=later_k, later_v=later_v, HAS_LATER=later_k is not None, dk=dk, dv=dv,
        **inputs, **seen, **fixed, **tile,
    )  # fmt: skip
    return [dq, dk, dv, shift]


def _seen(plan: Plan, runs: Runs) -> dict[str, object]:
    first, pin = runs

    def stride(x: Tensor | None) -> int:
        return 0 if x is None or x.shape[0] == 1 else x.shape[1]

    return {
        "first": first, "pin": pin, "tokens": plan.tokens, "prefix": plan.prefix, "window": plan.window,
        "first_stride": stride(first), "pin_stride": stride(pin), "scaling": plan.scaling,
        "cap": plan.softcap or 1.0, "HAS_FIRST": first is not None,
    }  # fmt: skip
