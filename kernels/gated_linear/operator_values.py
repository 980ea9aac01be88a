"""Decays of values as torch custom operators: the kernels of decays of keys, with tensors in each other's places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.gated_linear.operator import covered
from linearize.kernels.gated_linear.plan import make_value_plan
from linearize.kernels.gated_linear.reference import Gated


def gated_values_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    docs: Tensor | None,
    sums: Tensor | None,
    *,
    read_before: bool = False,
    segments: int = 0,
) -> Gated:
    """See `chunk.gated_linear_chunk` with `decay_values`; `segments` as in `operator.gated_linear_triton`.

    Raises:
        KernelError: the kernels do not cover the call.
    """
    covered(q, k, v, log_decay)
    k_extra, v_extra = missing(k), missing(v)
    width = v.shape[-1]
    q, k, v, log_decay = (
        filled(q, k_extra),
        filled(k, k_extra),
        filled(v, v_extra),
        filled(log_decay, v_extra),
    )
    start = None if sums is None else F.pad(sums.float(), (0, v_extra, 0, k_extra)).mT
    out, final, *_ = forward(q, k, v, log_decay, docs, start, [int(read_before), 0, segments])
    return out[..., :width], None, (final.mT[..., : k.shape[-1] - k_extra, :width], None)


def missing(x: Tensor) -> int:
    """Columns up to the next power of two, at least 16."""
    return int(max(16, 1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1])


def filled(x: Tensor, columns: int) -> Tensor:
    """With that many columns of zeros behind its own."""
    return F.pad(x, (0, columns)) if columns else x


@torch.library.custom_op("linearize::gated_values", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, docs: Tensor | None, start: Tensor | None, numbers: list[int]
) -> list[Tensor]:  # fmt: skip
    """Outputs, the final state transposed [B, M, V, K], and what backward reuses: states, and marks of chunks."""
    from linearize.kernels.gated_linear.launches_key import value_outputs
    from linearize.kernels.gated_linear.launches_states import scan

    plan = make_value_plan(q, k, v, numbers)
    q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
    docs, start = (None if x is None else x.contiguous() for x in (docs, start))
    outputs = _outputs(q, k, v, numbers)
    out, final, *stored, marks = outputs
    ends = [final, final.new_empty(0)]
    scan(plan, v, k, None, log_decay, docs, (start, None), stored, ends, reverse=False)
    value_outputs(plan, q, k, v, log_decay, docs, stored, marks, out)
    return outputs


@forward.register_fake
def _(q, k, v, log_decay, docs, start, numbers):
    return _outputs(q, k, v, numbers)


def _outputs(q: Tensor, k: Tensor, v: Tensor, numbers: list[int]) -> list[Tensor]:
    plan = make_value_plan(q, k, v, numbers)
    marks = q.new_empty(plan.batch, plan.state_heads, plan.tiles, dtype=torch.int32)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return [out, plan.state(q)[0], *plan.states(q), marks]


@torch.library.custom_op("linearize::gated_values_backward", mutates_args=())
def backward(
    do: Tensor, final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, docs: Tensor | None,
    stored: list[Tensor], wants_start: bool, numbers: list[int],
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv, the gradients of log decays and, where it is wanted, of the carried state."""
    from linearize.kernels.gated_linear.launches_key import key_gradients, key_outputs
    from linearize.kernels.gated_linear.launches_states import scan

    plan = make_value_plan(q, k, v, numbers)
    do, q, k, v, log_decay = (x.contiguous() for x in (do, q, k, v, log_decay))
    docs, final = (None if x is None else x.contiguous() for x in (docs, final))
    *stored, marks = stored
    ahead, start = plan.states(q), plan.state(q)
    scan(
        plan, do, q, None, log_decay, docs, (final, None), ahead, start if wants_start else None, reverse=True
    )
    dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, log_decay))
    key_outputs(plan, do, v, k, log_decay, None, docs, stored, marks, dq, None)
    key_gradients(
        plan, do, v, k, log_decay, None, docs, q, None, stored, marks, ahead, None, dv, dk, dg
    )  # fmt: skip
    return [dq, dk, dv, dg, start[0] if wants_start else q.new_empty(0)]


@backward.register_fake
def _(do, final, q, k, v, log_decay, docs, stored, wants_start, numbers):
    made = [x.new_empty(x.shape) for x in (q, k, v, log_decay)]
    plan = make_value_plan(q, k, v, numbers)
    return [*made, plan.state(q)[0] if wants_start else q.new_empty(0)]


def _setup(ctx, inputs, output) -> None:
    *tensors, numbers = inputs
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:5], *output[2:])


def _backward(ctx, grads):
    q, k, v, log_decay, docs, *stored = ctx.saved_tensors
    do = q.new_zeros(*q.shape[:3], v.shape[3]) if grads[0] is None else grads[0]
    wants_start = ctx.needs_input_grad[5]
    dq, dk, dv, dg, start = backward(do, grads[1], q, k, v, log_decay, docs, stored, wants_start, ctx.numbers)
    return dq, dk, dv, dg, None, start if wants_start else None, None


forward.register_autograd(_backward, setup_context=_setup)
