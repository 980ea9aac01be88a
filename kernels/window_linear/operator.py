"""window_linear as torch custom operators over the Triton kernels: shapes checked, kernels launched, gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window_linear import shared_memory
from linearize.kernels.window_linear.plan import Plan, make_plan
from linearize.kernels.window_linear.reference import Layer, Pins, Weights
from linearize.kernels.window_linear.sizes import MOST_PINS

Numbers = list[float]
"""What is no tensor: window, least, prefix, return_state, segments (0: as many as the device wants), scaling, roomy,
pins."""


def window_linear_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    layer: Layer,
    codes: Tensor | None,
    reach: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    return_state: bool,
    segments: int = 0,
    pins: Pins | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """See `chunk.window_linear`.

    Head dims that are no power of two are filled up with zeros, which changes no product.

    Args:
        segments: into how many pieces the scan over chunks is cut; 0: as the device's size asks for.
    """
    covered(q, k, v, weights, layer, state, pins)
    value_dim = v.shape[-1]
    query_map, key_map = weights.query_map, weights.key_map
    count, place, past_codes, asking = 0, None, None, None
    if pins is not None:
        count, place, past_codes, asking = pins.count, pins.place, pins.past, pins.asking
    k_extra, v_extra = (_extra(x.shape[-1]) for x in (k, v))
    if k_extra:
        q, k = F.pad(q, (0, k_extra)), F.pad(k, (0, k_extra))
        asking = None if asking is None else F.pad(asking, (0, k_extra))
        query_map, key_map = F.pad(query_map, (0, 0, 0, k_extra)), F.pad(key_map, (0, 0, 0, k_extra))
    if v_extra:
        v = F.pad(v, (0, v_extra))
        state = None if state is None else (F.pad(state[0], (0, v_extra)), state[1])
    start, start_norm = (None, None) if state is None else (state[0].float(), state[1].float())
    roomy = shared_memory.aligned_fits(q.device, *_sizes(q, v, weights), trains=_trains(q, k, v, weights))
    numbers = [layer.window, layer.least, layer.prefix, return_state, segments, layer.scaling, roomy, count]
    window_weight = weights.window_weight if layer.window else None
    if window_weight is None and layer.window:
        window_weight = torch.ones(q.shape[2], device=q.device)
    out, _, _, sums, norms, *_ = forward(
        q, k, v, query_map, key_map, window_weight, weights.linear_weight, weights.sink,
        codes, reach, start, start_norm, place, past_codes, asking, [float(x) for x in numbers],
    )  # fmt: skip
    out = out[..., :value_dim] if v_extra else out
    if not return_state:
        return out, None
    return out, (sums[..., :value_dim] if v_extra else sums, norms)


def covered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    layer: Layer,
    state: tuple[Tensor, Tensor] | None,
    pins: Pins | None = None,
) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    state_heads, _, f = weights.key_map.shape
    heads, kv_heads = q.shape[2], k.shape[2]
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    dispatch.require(
        "window_linear",
        dtype=(
            q.dtype in kinds and q.dtype == k.dtype == v.dtype,
            f"{q.dtype}, {k.dtype}, {v.dtype}: one of {kinds}",
        ),
        key_dim=(k.shape[-1] <= 256, f"{k.shape[-1]} must be at most 256"),
        value_dim=(v.shape[-1] <= 256, f"{v.shape[-1]} must be at most 256"),
        map_dim=(16 <= f <= 128 and f & (f - 1) == 0, f"{f} must be 16, 32, 64 or 128"),
        heads=(heads % kv_heads == 0, f"{heads} must be a multiple of {kv_heads} key-value heads"),
        key_maps=(state_heads in (heads, kv_heads), f"{state_heads} must be {heads} or {kv_heads}"),
        state=(
            state is None or not (state[0].requires_grad or state[1].requires_grad),
            "a carried state takes no gradient: detach it",
        ),
        pins=(
            pins is None or 0 < pins.count <= MOST_PINS,
            f"{0 if pins is None else pins.count} must be 1 to {MOST_PINS}",
        ),
        shared_memory=room(q, k, v, weights),
    )


def room(q: Tensor, k: Tensor, v: Tensor, weights: Weights) -> tuple[bool, str]:
    """Whether the device has the shared memory for a call, and the sentence to refuse it with."""
    sizes = _sizes(q, v, weights)
    if max(sizes[1:3]) > 256:
        return True, ""  # refused for its head dims
    return shared_memory.rule(q.device, *sizes, trains=_trains(q, k, v, weights))


def _sizes(q: Tensor, v: Tensor, weights: Weights) -> tuple[torch.dtype, int, int, int]:
    """dtype, head dims as the kernels see them, columns of the maps."""
    key_dim, value_dim = (x.shape[-1] + _extra(x.shape[-1]) for x in (q, v))
    return q.dtype, key_dim, value_dim, weights.key_map.shape[-1]


def _trains(q: Tensor, k: Tensor, v: Tensor, weights: Weights) -> bool:
    """Whether backward will run."""
    factors = (weights.window_weight, weights.linear_weight, weights.sink)
    tensors = (q, k, v, weights.query_map, weights.key_map, *factors)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _extra(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length()) - width


@torch.library.custom_op("linearize::window_linear", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, query_map: Tensor, key_map: Tensor,
    window_weight: Tensor | None, linear_weight: Tensor | None, sink: Tensor | None,
    codes: Tensor | None, reach: Tensor | None, start: Tensor | None, start_norm: Tensor | None,
    pin: Tensor | None, past_codes: Tensor | None, asking: Tensor | None, numbers: list[float],
) -> list[Tensor]:  # fmt: skip
    """out, row maximum, 1 / denominator, final sums and norms, and what backward reuses."""
    from linearize.kernels.window_linear.launches import launch_forward

    plan = make_plan(q, k, v, query_map, key_map, numbers)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    maps = query_map.to(q.dtype).contiguous(), key_map.to(q.dtype).contiguous()
    factors = tuple(
        None if x is None else x.float().contiguous() for x in (window_weight, linear_weight, sink)
    )
    carried = tuple(None if x is None else x.contiguous() for x in (start, start_norm))
    return launch_forward(
        plan,
        q,
        k,
        v,
        maps,
        factors,
        _masks(codes, reach),
        carried,
        _pinned(q, codes, pin, past_codes, asking),
    )


def _masks(*given: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.to(torch.int32).contiguous() for x in given)


def _pinned(
    q: Tensor, codes: Tensor | None, pin: Tensor | None, past_codes: Tensor | None, asking: Tensor | None
):
    """See `launches.Pinned`: without pinned keys the past sees what the window does, and nobody asks otherwise."""
    past_codes = codes if past_codes is None else past_codes
    return (*_masks(pin, past_codes), q if asking is None else asking.contiguous())


@forward.register_fake
def _(
    q, k, v, query_map, key_map, window_weight, linear_weight, sink, codes, reach, start, start_norm, pin, past_codes,
    asking, numbers,
):  # fmt: skip
    plan = make_plan(q, k, v, query_map, key_map, numbers)
    return plan.outputs(q)


@torch.library.custom_op("linearize::window_linear_backward", mutates_args=())
def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, query_map: Tensor, key_map: Tensor,
    window_weight: Tensor | None, linear_weight: Tensor | None, sink: Tensor | None,
    codes: Tensor | None, reach: Tensor | None, pin: Tensor | None, past_codes: Tensor | None, asking: Tensor | None,
    saved: list[Tensor], train_maps: bool, train_inputs: bool, numbers: list[float],
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv, of `asking` (without `train_inputs` of no numbers), float32 ones of maps [H, K, f], factors [H]."""
    from linearize.kernels.window_linear.launches import launch_backward

    plan = make_plan(q, k, v, query_map, key_map, numbers)
    do, q, k, v = (x.contiguous() for x in (do, q, k, v))
    maps = query_map.to(q.dtype).contiguous(), key_map.to(q.dtype).contiguous()
    factors = tuple(
        None if x is None else x.float().contiguous() for x in (window_weight, linear_weight, sink)
    )
    pinned = _pinned(q, codes, pin, past_codes, asking)
    found = launch_backward(
        plan, do, q, k, v, maps, factors, _masks(codes, reach), pinned, saved, train_maps, train_inputs
    )
    return found if train_inputs else [x.new_empty(0) for x in (q, k, v, q)] + found[4:]


@backward.register_fake
def _(
    do, q, k, v, query_map, key_map, window_weight, linear_weight, sink, codes, reach, pin, past_codes, asking, saved,
    train_maps, train_inputs, numbers,
):  # fmt: skip
    plan = make_plan(q, k, v, query_map, key_map, numbers)
    inputs = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if train_inputs and x is not None
        else q.new_empty(0)
        for x in (q, k, v, asking)
    ]
    return inputs + plan.gradients(q, train_maps)


def _setup(ctx, inputs, output) -> None:
    *tensors, codes, reach, _, _, pin, past_codes, asking, numbers = inputs
    ctx.set_materialize_grads(False)  # or zeros as large as the saved states would be made for each backward
    out, maximum, log_inverse, _, _, *past = output
    ctx.numbers = numbers
    ctx.save_for_backward(*tensors, codes, reach, pin, past_codes, asking, out, maximum, log_inverse, *past)


def _backward(ctx, grads):
    q, k, v, query_map, key_map, window_weight, linear_weight, sink, *rest = ctx.saved_tensors
    masks, saved = rest[:5], rest[5:]
    if grads[0] is None:
        return (None,) * len(ctx.needs_input_grad)
    needs = ctx.needs_input_grad
    train_maps, train_inputs = needs[3] or needs[4], any(needs[:3]) or needs[14]
    found = backward(
        grads[0], q, k, v, query_map, key_map, window_weight, linear_weight, sink, *masks, saved, train_maps,
        train_inputs, ctx.numbers,
    )  # fmt: skip
    dq, dk, dv, dasking, for_query_map, for_key_map, for_weight, for_factor, for_sink = found

    def kept(gradient: Tensor, parameter: Tensor | None, needed: bool) -> Tensor | None:
        return gradient.to(parameter.dtype) if parameter is not None and needed else None

    if not train_inputs:
        dq = dk = dv = dasking = None
    return (
        dq, dk, dv, kept(for_query_map, query_map, needs[3]), kept(for_key_map, key_map, needs[4]),
        kept(for_weight, window_weight, needs[5]), kept(for_factor, linear_weight, needs[6]),
        kept(for_sink, sink, needs[7]), None, None, None, None, None, None, dasking if needs[14] else None, None,
    )  # fmt: skip


forward.register_autograd(_backward, setup_context=_setup)


__all__ = ["Plan", "covered", "window_linear_triton"]
