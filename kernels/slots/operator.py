"""Gated slots as torch custom operators: both passes of gated_linear's kernels, with the softmax between them.

One operator, since what the passes share then is made once: the slots' log decays get one gradient, to which the second
pass writes and the first one adds, and where writes are 1 - exp(log_decay) their gradients never leave the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_linear.operator_values import filled, missing
from linearize.kernels.gated_linear.plan import Plan, make_plan, make_value_plan
from linearize.kernels.slots.reference import SlotState

WHOLE = 64
"""Slots whose softmax is taken inside the kernel."""


def slots_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    writes: Tensor | None,
    log_decay: Tensor,
    docs: Tensor | None,
    state: SlotState,
    *,
    segments: int = 0,
) -> tuple[Tensor, SlotState]:
    """See `chunk.slots_chunk`; `segments` as in `gated_linear.operator`.

    Widths that are no power of two are filled up with zeros; slots that this adds are left out of the softmax.

    Raises:
        KernelError: the kernels do not cover the call.
    """
    covered(q, k, v, writes, log_decay)
    key_dim, value_dim, slots = k.shape[-1], v.shape[-1], log_decay.shape[-1]
    k_extra, v_extra, s_extra = missing(k), missing(v), missing(log_decay)
    q, k, v, log_decay = (
        filled(q, k_extra),
        filled(k, k_extra),
        filled(v, v_extra),
        filled(log_decay, s_extra),
    )
    given = None if writes is None else filled(writes.to(v.dtype), s_extra)
    keys = F.pad(state[0].float(), (0, s_extra, 0, k_extra)).mT
    values = F.pad(state[1].float(), (0, v_extra, 0, s_extra))
    out, keys, values, *_ = forward(q, k, v, given, log_decay, docs, keys, values, [slots, segments])
    return out[..., :value_dim], (keys.mT[..., :key_dim, :slots], values[..., :slots, :value_dim])


def covered(q: Tensor, k: Tensor, v: Tensor, writes: Tensor | None, log_decay: Tensor) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    dispatch.require(
        "slots",
        dtype=(
            q.dtype in kinds and q.dtype == k.dtype == v.dtype,
            f"{q.dtype}, {k.dtype}, {v.dtype}: one of {kinds}",
        ),
        log_decay=(log_decay.dtype in kinds, f"{log_decay.dtype} is none of {kinds}"),
        widths=(
            max(k.shape[-1], v.shape[-1], log_decay.shape[-1]) <= 256,
            f"{k.shape[-1]}, {v.shape[-1]} and {log_decay.shape[-1]} slots must be at most 256",
        ),
        heads=(q.shape[2] % k.shape[2] == 0, f"{q.shape[2]} must be a multiple of {k.shape[2]} heads of the state"),
    )  # fmt: skip


def _plans(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, numbers: list[int]) -> tuple[Plan, Plan]:
    """Of both passes."""
    options = [0, 0, numbers[1]]
    first = make_value_plan(q, k, log_decay, options)
    weights = q[..., :1].expand(*q.shape[:3], log_decay.shape[3])
    return first, make_plan(weights, log_decay, v, log_decay, options)


def _outputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, numbers: list[int]) -> list[Tensor]:
    """Outputs, both final states (of keys [B, M, S, K]), weights, writes, states of both passes, marks of chunks."""
    first, second = _plans(q, k, v, log_decay, numbers)
    out, weights = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], log_decay.shape[3])
    writes = torch.empty_like(log_decay, dtype=q.dtype, memory_format=torch.contiguous_format)
    marks = q.new_empty(first.batch, first.state_heads, first.tiles, dtype=torch.int32)
    ends = [first.state(q)[0], second.state(q)[0]]
    return [out, *ends, weights, writes, marks, *first.states(q), *second.states(q)]


@torch.library.custom_op("linearize::slots", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, writes: Tensor | None, log_decay: Tensor, docs: Tensor | None,
    keys: Tensor, values: Tensor, numbers: list[int],
) -> list[Tensor]:  # fmt: skip
    """See `_outputs`; numbers: slots that count, segments."""
    from linearize.kernels.gated_linear.launches_key import key_outputs, value_outputs
    from linearize.kernels.gated_linear.launches_states import scan
    from linearize.kernels.slots.triton_writes import launch_writes

    first, second = _plans(q, k, v, log_decay, numbers)
    q, k, v, log_decay, keys, values = (x.contiguous() for x in (q, k, v, log_decay, keys, values))
    docs = None if docs is None else docs.contiguous()
    outputs = _outputs(q, k, v, log_decay, numbers)
    out, last_keys, last_values, weights, taken, marks, *stored = outputs
    nothing, slots = q.new_empty(0), numbers[0]
    if writes is None:
        launch_writes(log_decay, taken)
    else:
        taken.copy_(writes)
    scan(
        first, taken, k, None, log_decay, docs, (keys, None), stored[:5], [last_keys, nothing], reverse=False
    )
    if log_decay.shape[3] <= WHOLE:
        value_outputs(first, q, k, taken, log_decay, docs, stored[:5], marks, weights, softmax=slots)
    else:
        # the softmax of rounded scores would lose digits
        scores = torch.empty_like(weights, dtype=torch.float32)
        value_outputs(first, q, k, taken, log_decay, docs, stored[:5], marks, scores)
        if slots < scores.shape[3]:
            scores[..., slots:] = float("-inf")
        weights.copy_(scores.softmax(-1))
    scan(
        second, taken, v, None, log_decay, docs, (values, None), stored[5:], [last_values, nothing], reverse=False
    )  # fmt: skip
    key_outputs(second, weights, taken, v, log_decay, None, docs, stored[5:], marks, out, None)
    return outputs


@forward.register_fake
def _(q, k, v, writes, log_decay, docs, keys, values, numbers):
    return _outputs(q, k, v, log_decay, numbers)


@torch.library.custom_op("linearize::slots_backward", mutates_args=())
def backward(
    do: Tensor, last_keys: Tensor | None, last_values: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor, docs: Tensor | None, stored: list[Tensor], own_writes: bool, wants_state: bool,
    numbers: list[int],
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv, dwrites (empty without `own_writes`), the gradients of log decays and of both carried states."""
    from linearize.kernels.gated_linear.launches_key import key_gradients, key_outputs
    from linearize.kernels.gated_linear.launches_states import scan

    first, second = _plans(q, k, v, log_decay, numbers)
    do, q, k, v, log_decay = (x.contiguous() for x in (do, q, k, v, log_decay))
    docs, last_keys, last_values = (
        None if x is None else x.contiguous() for x in (docs, last_keys, last_values)
    )
    weights, taken, marks, *states = stored
    dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, log_decay))
    keys, values = first.state(q), second.state(q)
    twice = [torch.empty_like(taken) if own_writes else None for _ in range(2)]

    ahead = second.states(q)
    scan(
        second, weights, do, None, log_decay, docs, (last_values, None), ahead, values if wants_state else None,
        reverse=True,
    )  # fmt: skip
    dweights = torch.empty_like(weights)
    key_gradients(
        second, weights, taken, v, log_decay, None, docs, do, None, states[5:], marks, ahead, dweights, twice[0], dv, dg
    )  # fmt: skip
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
    del dweights
    ahead = first.states(q)
    scan(
        first, dscores, q, None, log_decay, docs, (last_keys, None), ahead, keys if wants_state else None, reverse=True
    )  # fmt: skip
    key_outputs(first, dscores, taken, k, log_decay, None, docs, states[:5], marks, dq, None)
    key_gradients(
        first, dscores, taken, k, log_decay, None, docs, q, None, states[:5], marks, ahead, None, twice[1], dk, dg,
        add=True,
    )  # fmt: skip
    one, other = twice
    none = [q.new_empty(0) for _ in range(3)]
    dwrites = none[0] if one is None or other is None else one.add_(other)
    return [dq, dk, dv, dwrites, dg, *([keys[0], values[0]] if wants_state else none[1:])]


@backward.register_fake
def _(do, last_keys, last_values, q, k, v, log_decay, docs, stored, own_writes, wants_state, numbers):
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, log_decay))
    first, second = _plans(q, k, v, log_decay, numbers)
    dwrites = stored[1].new_empty(stored[1].shape if own_writes else 0)
    ends = [plan.state(q)[0] if wants_state else q.new_empty(0) for plan in (first, second)]
    return [dq, dk, dv, dwrites, dg, *ends]


def _setup(ctx, inputs, output) -> None:
    q, k, v, writes, log_decay, docs, _, _, ctx.numbers = inputs
    ctx.own_writes = writes is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_decay, docs, *output[3:])


def _backward(ctx, grads):
    q, k, v, log_decay, docs, *stored = ctx.saved_tensors
    do = q.new_zeros(*q.shape[:3], v.shape[3]) if grads[0] is None else grads[0]
    needs = ctx.needs_input_grad
    dq, dk, dv, dwrites, dg, keys, values = backward(
        do, grads[1], grads[2], q, k, v, log_decay, docs, stored, ctx.own_writes, needs[6] or needs[7], ctx.numbers
    )  # fmt: skip
    return (
        dq, dk, dv, dwrites if ctx.own_writes else None, dg, None,
        keys if needs[6] else None, values if needs[7] else None, None,
    )  # fmt: skip


forward.register_autograd(_backward, setup_context=_setup)
