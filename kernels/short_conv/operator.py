"""short_conv as torch custom operators over the Triton kernels: shapes checked, kernels launched, gradients wired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch

STREAMS, TAPS = 3, 8
"""Streams in a launch and taps of a filter, at most."""
KINDS = (torch.float32, torch.float16, torch.bfloat16)
FORWARD = {"BT": 64, "BC": 64, "num_warps": 4, "num_stages": 1}
SPANS = (128, 64, 32)
"""Tokens of a program in backward: each reads 3 (W - 1) rows that belong to its neighbours beside 2 a token."""
PROGRAMS = 8192
"""Of one warp each, 14 to 16 an SM: they fill an H100 about four times over. With fewer, spans are shorter."""
STEP_CHANNELS = 256
"""Channels of a program in the one-token form."""
Lists = list[Tensor]


def streams_triton(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    codes: Tensor | None,
    states: Sequence[Tensor] | None,
    biases: Sequence[Tensor] | None,
    silu: bool,
    residual: bool,
    return_state: bool,
) -> tuple[Lists, Lists | None]:
    """See `streams.short_conv_streams`; at most three streams."""
    covered(inputs, weights, states, biases)
    taps = weights[0].shape[-1]
    if not inputs[0].numel():  # no tokens, no rows or no channels: nothing to launch, the state is as it was
        kept = [x.clone() for x in states] if states is not None else _zeros(inputs, taps)
        return [torch.empty_like(x) for x in inputs], kept if return_state else None
    found = forward(
        list(inputs),
        list(weights),
        list(biases or []),
        list(states or []),
        codes,
        silu,
        residual,
        return_state,
    )
    return found[: len(inputs)], found[len(inputs) :] if return_state else None


def _zeros(inputs: Sequence[Tensor], taps: int) -> Lists:
    return [x.new_zeros(x.shape[0], taps - 1, *x.shape[2:]) for x in inputs]


def covered(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    biases: Sequence[Tensor] | None,
) -> None:
    """Refuse what the kernels do not cover.

    Raises:
        KernelError: with every rule that is broken.
    """
    taps = {weight.shape[-1] for weight in weights}
    dtypes = {x.dtype for x in inputs}
    widths = [tuple(x.shape[-2:]) for x in inputs]
    rows = {tuple(x.shape[:-2]) for x in inputs}
    channels = max(h * d for h, d in widths)
    dispatch.require(
        "short_conv",
        streams=(1 <= len(inputs) <= STREAMS, f"{len(inputs)} of them: 1 to {STREAMS}"),
        dtype=(len(dtypes) == 1 and dtypes <= set(KINDS), f"{sorted(map(str, dtypes))}: one of {KINDS} for all"),
        taps=(len(taps) == 1 and 1 <= max(taps) <= TAPS, f"{sorted(taps)}: one number for all, 1 to {TAPS}"),
        weights=(
            [tuple(x.shape[:-1]) for x in weights] == widths,
            f"{[tuple(x.shape) for x in weights]} must be heads, width, taps of {widths}",
        ),
        bias=(
            biases is None or [tuple(x.shape) for x in biases] == widths,
            "there must be one of heads, width for each stream",
        ),
        state=(
            states is None
            or [tuple(x.shape) for x in states] == [(x.shape[0], max(taps) - 1, *x.shape[-2:]) for x in inputs],
            "there must be one of batch, taps - 1, heads, width for each stream",
        ),
        rows=(len(rows) == 1, f"{sorted(rows)}: all streams have the same batch and tokens"),
        channels=(channels < 2**22, f"{channels} must be under {2**22:,}"),
    )  # fmt: skip


def _blocks(inputs: Sequence[Tensor], size: int) -> list[int]:
    return [-(-x.shape[-2] * x.shape[-1] // size) for x in inputs]


def _named(names: Sequence[str], columns: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Kernel arguments name0, name1, name2 from a list for each name; None where a stream or a list is absent."""
    found = {}
    for name, values in zip(names, columns, strict=True):
        for index in range(STREAMS):
            found[f"{name}{index}"] = values[index] if index < len(values) else None
    return found


def _without_last(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The last stream's blocks are what is left over: the kernels take no number for them."""
    return {key: value for key, value in found.items() if key != f"{name}{STREAMS - 1}"}


@torch.library.custom_op("linearize::short_conv", mutates_args=())
def forward(
    inputs: list[Tensor], weights: list[Tensor], biases: list[Tensor], starts: list[Tensor], codes: Tensor | None,
    silu: bool, residual: bool, return_state: bool,
) -> list[Tensor]:  # fmt: skip
    """y of every stream, then, if asked for, every stream's new state."""
    from linearize.kernels.short_conv.triton_forward import forward_kernel

    inputs, weights, biases, starts = (
        [x.contiguous() for x in xs] for xs in (inputs, weights, biases, starts)
    )
    codes = None if codes is None else codes.to(torch.int32).contiguous()
    batch, tokens = inputs[0].shape[:2]
    outputs = [torch.empty_like(x) for x in inputs]
    finals = _states(inputs, weights, starts) if return_state else []
    blocks = _blocks(inputs, FORWARD["BC"])
    names = ("x", "weight", "bias", "start", "y", "final", "channels", "blocks")
    widths = [x.shape[-2] * x.shape[-1] for x in inputs]
    columns = (inputs, weights, biases, starts, outputs, finals, widths, blocks)
    launch(
        forward_kernel, (sum(blocks), -(-tokens // FORWARD["BT"]), batch),
        **_without_last(_named(names, columns), "blocks"), codes=codes, tokens=tokens,
        STREAMS=len(inputs), TAPS=weights[0].shape[-1], HAS_BIAS=bool(biases), HAS_START=bool(starts),
        HAS_CODES=codes is not None, SILU=silu, RESIDUAL=residual, HAS_FINAL=return_state, **FORWARD,
    )  # fmt: skip
    return [*outputs, *finals]


def _states(inputs: Lists, weights: Lists, starts: Lists) -> Lists:
    """New states [B, W - 1, H, D], uninitialized, in the dtype of the carried ones."""
    taps = weights[0].shape[-1]
    return [
        x.new_empty(x.shape[0], taps - 1, *x.shape[2:], dtype=starts[index].dtype if starts else x.dtype)
        for index, x in enumerate(inputs)
    ]


@forward.register_fake
def _(inputs, weights, biases, starts, codes, silu, residual, return_state):
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    return [*outputs, *(_states(inputs, weights, starts) if return_state else [])]


@torch.library.custom_op("linearize::short_conv_backward", mutates_args=())
def backward(
    dys: list[Tensor], dfinals: list[Tensor], inputs: list[Tensor], weights: list[Tensor], biases: list[Tensor],
    starts: list[Tensor], codes: Tensor | None, silu: bool, residual: bool, start_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    """Of every stream dx, then dw [H, D, W], then dbias where there is one, then the carried states' if asked for."""
    from linearize.kernels.short_conv.triton_backward import backward_kernel

    dys, dfinals, inputs, weights, biases, starts = (
        [x.contiguous() for x in xs] for xs in (dys, dfinals, inputs, weights, biases, starts)
    )
    codes = None if codes is None else codes.to(torch.int32).contiguous()
    (batch, tokens), taps = inputs[0].shape[:2], weights[0].shape[-1]
    made = backward_configuration(taps, inputs[0].element_size())
    blocks = _blocks(inputs, made["BC"])
    widths = [x.shape[-2] * x.shape[-1] for x in inputs]
    reach = tokens + (taps - 1 if starts else 0)
    span = next((x for x in SPANS if batch * sum(blocks) * -(-reach // x) >= PROGRAMS), SPANS[-1])
    rows = -(-reach // span)
    dxs = [torch.empty_like(x) for x in inputs]
    dstarts = [torch.empty_like(x) for x in starts] if start_gradient else []
    # of all streams side by side, so that one sum adds them up
    partial = inputs[0].new_empty(batch * rows, taps + bool(biases), sum(widths), dtype=torch.float32)
    names = ("x", "weight", "bias", "start", "dy", "dfinal", "dx", "dstart", "partial", "channels", "blocks")
    partials = partial.split(widths, -1)
    columns = (inputs, weights, biases, starts, dys, dfinals, dxs, dstarts, partials, widths, blocks)
    launch(
        backward_kernel, (sum(blocks), rows, batch), **_without_last(_named(names, columns), "blocks"),
        codes=codes, tokens=tokens, span=span, total=sum(widths), STREAMS=len(inputs), TAPS=taps,
        HAS_BIAS=bool(biases), HAS_START=bool(starts), HAS_CODES=codes is not None, SILU=silu, RESIDUAL=residual,
        HAS_FINAL=bool(dfinals), START_GRADIENT=start_gradient, **made,
    )  # fmt: skip
    sums = partial.sum(0).split(widths, -1)
    for_weights = [  # copies: results of an operator must not share memory
        torch.empty_like(w).copy_(x[:taps].mT.reshape(w.shape)) for x, w in zip(sums, weights, strict=True)
    ]
    for_biases = [
        x[taps].view(bias.shape).to(bias.dtype, copy=True) for x, bias in zip(sums, biases, strict=False)
    ]
    return [*dxs, *for_weights, *for_biases, *dstarts]


def backward_configuration(taps: int, size: int) -> dict[str, int]:
    """One warp and 8 bytes a thread, 4 with many taps: of each number 4 W - 2 float32 and a group of x and dy are kept.

    `size` is that of a number of x, in bytes.
    """
    return {"GROUP": 4, "BC": 128 if size == 2 and taps <= 5 else 64, "num_warps": 1, "num_stages": 1}


@backward.register_fake
def _(dys, dfinals, inputs, weights, biases, starts, codes, silu, residual, start_gradient):
    kinds = (inputs, weights, biases, starts if start_gradient else [])
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for xs in kinds for x in xs]


def _setup(ctx, inputs, output) -> None:
    xs, weights, biases, starts, codes, silu, residual, return_state = inputs
    ctx.counts = [len(xs), len(weights), len(biases), len(starts)]
    ctx.options = silu, residual, return_state
    ctx.shapes = [(x.shape, x.dtype, x.device) for x in output]
    ctx.save_for_backward(*xs, *weights, *biases, *starts, codes)


def _backward(ctx, grads):
    *tensors, codes = ctx.saved_tensors
    xs, weights, biases, starts = _split(tensors, ctx.counts)
    silu, residual, return_state = ctx.options
    wanted = return_state and any(gradient is not None for gradient in grads[len(xs) :])
    used = len(ctx.shapes) if wanted else len(xs)
    given = [
        torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
        for gradient, (shape, dtype, device) in zip(grads[:used], ctx.shapes[:used], strict=True)
    ]
    needs = any(ctx.needs_input_grad[3])
    found = backward(
        given[: len(xs)], given[len(xs) :], xs, weights, biases, starts, codes, silu, residual, needs
    )
    if not needs:
        found = [*found, *(None for _ in starts)]
    return (*_split(found, ctx.counts), None, None, None, None)


def _split(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    found, position = [], 0
    for count in counts:
        found.append(list(values[position : position + count]))
        position += count
    return found


forward.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linearize::short_conv_step", mutates_args=("states", "outputs"))
def step(
    inputs: list[Tensor], weights: list[Tensor], biases: list[Tensor], states: list[Tensor], outputs: list[Tensor],
    valid: Tensor | None, silu: bool, residual: bool,
) -> None:  # fmt: skip
    """Fill `outputs` with y [B, H, D] of every stream; `states` move up by one. Nothing is allocated.

    Outputs are arguments, since torch compiles no operator that both writes in place and returns a list.
    """
    from linearize.kernels.short_conv.triton_step import step_kernel

    assert all(x.is_contiguous() for x in states), "a state that is written in place must be contiguous"
    flat = [_rows(x) for x in inputs]
    valid = None if valid is None else valid.contiguous()
    weights, biases = ([x.contiguous() for x in xs] for xs in (weights, biases))
    blocks = _blocks(inputs, STEP_CHANNELS)
    names = ("x", "weight", "bias", "state", "y", "stride", "channels", "blocks")
    widths = [x.shape[-2] * x.shape[-1] for x in inputs]
    columns = (flat, weights, biases, states, outputs, [x.stride(0) for x in flat], widths, blocks)
    launch(
        step_kernel, (sum(blocks), inputs[0].shape[0]), **_without_last(_named(names, columns), "blocks"),
        valid=valid, STREAMS=len(inputs), TAPS=weights[0].shape[-1], HAS_BIAS=bool(biases), HAS_VALID=valid is not None,
        SILU=silu, RESIDUAL=residual, BC=STEP_CHANNELS, num_warps=2, num_stages=1,
    )  # fmt: skip


def convolve_step(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], states: Sequence[Tensor],
    valid: Tensor | None, silu: bool, residual: bool,
) -> list[Tensor]:  # fmt: skip
    """y [B, H, D] of every stream, in one launch; see `step`."""
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    step(list(inputs), list(weights), list(biases), list(states), outputs, valid, silu, residual)
    return outputs


def _rows(x: Tensor) -> Tensor:
    """x [B, H, D] with a row's numbers one after the other; a slice of a fused projection stays where it is."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


@step.register_fake
def _(inputs, weights, biases, states, outputs, valid, silu, residual):
    return None
