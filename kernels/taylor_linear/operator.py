"""taylor_linear as torch custom operators over Triton kernels: shapes checked, launches made, gradients wired."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_linear.reference import Gated, GatedState
from linearize.kernels.taylor_linear.plan import DIMS, make_plan

Numbers = list[int]
"""normalize, segments (0: as many as the device wants): what is no tensor."""


def taylor_linear_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    docs: Tensor | None,
    valid: Tensor | None,
    state: GatedState | None,
    *,
    normalize: bool = True,
    segments: int = 0,
) -> Gated:
    """See `chunk.taylor_linear_chunk`. Values whose width is no power of two are filled up with zeros.

    Args:
        segments: into how many pieces the scan over the sequence is cut; 0: as the device's size asks for.
    """
    covered(q, k, v, scale)
    value_dim = v.shape[-1]
    start, start_norm = (None, None) if state is None else state
    if start is not None:
        start = start.float()
        if normalize:
            start_norm = torch.zeros_like(start[..., 0]) if start_norm is None else start_norm.float()
    codes = None
    if docs is not None or valid is not None:
        codes = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device) if docs is None else docs
        codes = codes.to(torch.int32)
        codes = codes if valid is None else torch.where(valid, codes, -1 - codes)
    extra = max(16, 1 << (value_dim - 1).bit_length()) - value_dim
    if extra:
        v = F.pad(v, (0, extra))
        start = None if start is None else F.pad(start, (0, extra))
    out, denominator, sums, norms, *_ = forward(
        q, k, v, codes, start, start_norm if normalize else None, scale, [int(normalize), segments]
    )
    if extra:
        out, sums = out[..., :value_dim], sums[..., :value_dim]
    return (out, denominator, (sums, norms)) if normalize else (out, None, (sums, None))


def covered(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    heads, state_heads, value_heads = q.shape[2], k.shape[2], v.shape[2]
    dispatch.require(
        "taylor_linear",
        dtype=(
            q.dtype in kinds and q.dtype == k.dtype == v.dtype,
            f"{q.dtype}, {k.dtype}, {v.dtype}: one of {kinds}",
        ),
        dim=(k.shape[-1] in DIMS, f"{k.shape[-1]} must be one of {DIMS}"),
        scale=(scale > 0, f"{scale} must be above zero"),
        value_dim=(v.shape[-1] <= 256, f"{v.shape[-1]} must be at most 256"),
        heads=(
            heads % state_heads == 0 and state_heads % value_heads == 0,
            f"{heads} must be a multiple of {state_heads} heads of the state, and these of {value_heads} of the values",
        ),
    )


@torch.library.custom_op("linearize::taylor_linear", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, codes: Tensor | None, start: Tensor | None, start_norm: Tensor | None,
    scale: float, numbers: list[int],
) -> list[Tensor]:  # fmt: skip
    """Numerators, denominators, final sums and norms, and the states that backward reuses.

    Args:
        codes: [B, T] int32, documents, or -1 less them on padding.
    """
    from linearize.kernels.taylor_linear.launches import launch_forward

    plan = make_plan(q, k, v, scale, numbers)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    rest = [None if x is None else x.contiguous() for x in (codes, start, start_norm)]
    return launch_forward(plan, q, k, v, rest[0], (rest[1], rest[2]))


@forward.register_fake
def _(q, k, v, codes, start, start_norm, scale, numbers):
    return make_plan(q, k, v, scale, numbers).outputs(q)


@torch.library.custom_op("linearize::taylor_linear_backward", mutates_args=())
def backward(
    do: Tensor, weight: Tensor | None, final: Tensor | None, final_norm: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, codes: Tensor | None, stored: list[Tensor], wants_start: bool,
    scale: float, numbers: list[int],
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv of each head of the state, and where they are wanted the gradients of the carried state."""
    from linearize.kernels.taylor_linear.launches import launch_backward

    plan = make_plan(q, k, v, scale, numbers)
    do, q, k, v = (x.contiguous() for x in (do, q, k, v))
    weight, final, final_norm, codes = (
        None if x is None else x.contiguous() for x in (weight, final, final_norm, codes)
    )
    return launch_backward(plan, do, weight, (final, final_norm), q, k, v, codes, stored, wants_start)


@backward.register_fake
def _(do, weight, final, final_norm, q, k, v, codes, stored, wants_start, scale, numbers):
    plan = make_plan(q, k, v, scale, numbers)
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
    made.append(v.new_empty(*k.shape[:3], v.shape[3]))
    return made + (plan.state(q) if wants_start else [q.new_empty(0), q.new_empty(0)])


def _setup(ctx, inputs, output) -> None:
    q, k, v, codes, _, _, ctx.scale, ctx.numbers = inputs
    # states that nothing reads get no gradient of zeros, which would be as large as they are
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, codes, *output[4:])


def _backward(ctx, grads):
    q, k, v, codes, *stored = ctx.saved_tensors
    do, weight, final, final_norm = grads[:4]
    normalize = ctx.numbers[0]
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[-1])
    if normalize:
        weight = q.new_zeros(q.shape[:3], dtype=torch.float32) if weight is None else weight
        if (final is None) != (final_norm is None):
            size = (len(q), k.shape[2], stored[0].shape[3])
            final = q.new_zeros(*size, v.shape[-1], dtype=torch.float32) if final is None else final
            final_norm = q.new_zeros(size, dtype=torch.float32) if final_norm is None else final_norm
    needs = ctx.needs_input_grad
    wants_start = needs[4] or needs[5]
    dq, dk, dv, start, start_norm = backward(
        do, weight if normalize else None, final, final_norm if normalize else None, q, k, v, codes, stored,
        wants_start, ctx.scale, ctx.numbers,
    )  # fmt: skip
    if dv.shape[2] != v.shape[2]:
        dv = dv.unflatten(2, (v.shape[2], -1)).sum(3)
    return dq, dk, dv, None, start if needs[4] else None, start_norm if needs[5] else None, None, None


forward.register_autograd(_backward, setup_context=_setup)
