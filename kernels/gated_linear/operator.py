"""gated_linear as torch custom operators over the Triton kernels: shapes checked, kernels launched, gradients wired."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_linear.plan import make_plan
from linearize.kernels.gated_linear.reference import Gated, GatedState

Numbers = list[int]
"""read_before, normalize, segments (0: as many as the device wants): what is no tensor."""


def gated_linear_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    docs: Tensor | None,
    state: GatedState | None,
    *,
    bonus: Tensor | None = None,
    read_before: bool = False,
    normalize: bool = True,
    segments: int = 0,
) -> Gated:
    """See `chunk.gated_linear_chunk`.

    Widths that are no power of two are filled up with zeros, which changes no product. What a `bonus` adds beside a
    decay of a head, or none, is a product of each token with itself, which torch does.

    Args:
        segments: into how many pieces the scan over the sequence is cut; 0: as the device's size asks for.
    """
    covered(q, k, v, log_decay)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    start, start_norm = (None, None) if state is None else state
    if start is not None:
        start = start.float()
        start_norm = (
            None
            if not normalize
            else start_norm
            if start_norm is not None
            else torch.zeros_like(start[..., 0])
        )
        start_norm = None if start_norm is None else start_norm.float()
    given_q, given_k, given_v = q, k, v
    k_extra, v_extra = (max(16, 1 << (width - 1).bit_length()) - width for width in (key_dim, value_dim))
    if k_extra:
        q, k = F.pad(q, (0, k_extra)), F.pad(k, (0, k_extra))
        if log_decay is not None and log_decay.dim() == 4:
            log_decay = F.pad(log_decay, (0, k_extra))
        start_norm = None if start_norm is None else F.pad(start_norm, (0, k_extra))
    inside = bonus is not None and log_decay is not None and log_decay.dim() == 4
    given_bonus = bonus if inside else None
    if given_bonus is not None and k_extra:
        given_bonus = F.pad(given_bonus, (0, k_extra))
    if v_extra:
        v = F.pad(v, (0, v_extra))
    if start is not None and (k_extra or v_extra):
        start = F.pad(start, (0, v_extra, 0, k_extra))
    numbers = [int(read_before or bonus is not None), int(normalize), segments]
    out, denominator, sums, norms, *_ = forward(
        q, k, v, log_decay, given_bonus, docs, start, start_norm, numbers
    )
    out = out[..., :value_dim] if v_extra else out
    if bonus is not None and not inside:
        own = given_q.float().unflatten(2, (k.shape[2], -1)) * (given_k.float() * bonus.float())[..., None, :]
        own = own.sum(-1, keepdim=True)
        out = (out.float() + (own * given_v.float()[..., None, :]).flatten(2, 3)).to(out.dtype)
        denominator = denominator + own.flatten(2) if normalize else denominator
    sums = sums[..., :key_dim, :value_dim] if k_extra or v_extra else sums
    if not normalize:
        return out, None, (sums, None)
    return out, denominator, (sums, norms[..., :key_dim] if k_extra else norms)


def covered(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    heads, state_heads = q.shape[2], k.shape[2]
    decay_dtype = torch.float32 if log_decay is None else log_decay.dtype
    dispatch.require(
        "gated_linear",
        dtype=(
            q.dtype in kinds and q.dtype == k.dtype == v.dtype,
            f"{q.dtype}, {k.dtype}, {v.dtype}: one of {kinds}",
        ),
        log_decay=(decay_dtype in kinds, f"{decay_dtype} is none of {kinds}"),
        features=(k.shape[-1] <= 256, f"{k.shape[-1]} must be at most 256"),
        value_dim=(v.shape[-1] <= 256, f"{v.shape[-1]} must be at most 256"),
        heads=(heads % state_heads == 0, f"{heads} must be a multiple of {state_heads} heads of the state"),
    )


@torch.library.custom_op("linearize::gated_linear", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None, docs: Tensor | None,
    start: Tensor | None, start_norm: Tensor | None, numbers: list[int],
) -> list[Tensor]:  # fmt: skip
    """Numerators, denominators, final sums and norms, and what backward reuses: states, and marks of chunks."""
    from linearize.kernels.gated_linear.launches import launch_forward

    plan = make_plan(q, k, v, log_decay, numbers)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    rest = [None if x is None else x.contiguous() for x in (log_decay, bonus, docs, start, start_norm)]
    return launch_forward(plan, q, k, v, rest[0], rest[1], rest[2], (rest[3], rest[4]))


@forward.register_fake
def _(q, k, v, log_decay, bonus, docs, start, start_norm, numbers):
    return make_plan(q, k, v, log_decay, numbers).outputs(q)


@torch.library.custom_op("linearize::gated_linear_backward", mutates_args=())
def backward(
    do: Tensor, weight: Tensor | None, final: Tensor | None, final_norm: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None, docs: Tensor | None,
    stored: list[Tensor], wants_start: bool, numbers: list[int],
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv, the gradients of log decays and bonus, and where they are wanted those of the carried state."""
    from linearize.kernels.gated_linear.launches import launch_backward

    plan = make_plan(q, k, v, log_decay, numbers)
    do, q, k, v = (x.contiguous() for x in (do, q, k, v))
    rest = [
        None if x is None else x.contiguous() for x in (weight, final, final_norm, log_decay, bonus, docs)
    ]
    ends = (rest[1], rest[2])
    return launch_backward(plan, do, rest[0], ends, q, k, v, rest[3], rest[4], rest[5], stored, wants_start)


@backward.register_fake
def _(do, weight, final, final_norm, q, k, v, log_decay, bonus, docs, stored, wants_start, numbers):
    plan = make_plan(q, k, v, log_decay, numbers)
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    made.append(q.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape))
    made.append(q.new_empty((0,) if bonus is None else bonus.shape, dtype=torch.float32))
    return made + (plan.state(q) if wants_start else [q.new_empty(0), q.new_empty(0)])


def _setup(ctx, inputs, output) -> None:
    *tensors, numbers = inputs
    ctx.numbers = numbers
    # states that nothing reads get no gradient of zeros, which would be as large as they are
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:6], *output[4:])


def _backward(ctx, grads):
    q, k, v, log_decay, bonus, docs, *stored = ctx.saved_tensors
    do, weight, final, final_norm = grads[:4]
    normalize = ctx.numbers[1]
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[-1])
    if normalize:
        weight = q.new_zeros(q.shape[:3], dtype=torch.float32) if weight is None else weight
        if (final is None) != (final_norm is None):
            size = (len(q), k.shape[2], k.shape[3])
            final = q.new_zeros(*size, v.shape[-1], dtype=torch.float32) if final is None else final
            final_norm = q.new_zeros(size, dtype=torch.float32) if final_norm is None else final_norm
    needs = ctx.needs_input_grad
    wants_start = needs[6] or needs[7]
    dq, dk, dv, dg, du, start, start_norm = backward(
        do, weight if normalize else None, final, final_norm if normalize else None, q, k, v, log_decay, bonus, docs,
        stored, wants_start, ctx.numbers,
    )  # fmt: skip
    return (
        dq, dk, dv, None if log_decay is None else dg, None if bonus is None else du.to(bonus.dtype), None,
        start if needs[6] else None, start_norm if needs[7] else None, None,
    )  # fmt: skip


forward.register_autograd(_backward, setup_context=_setup)
