"""The short convolutions of a layer's q, k and v together: one launch on a GPU, one after the other in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.short_conv.chunk import chunk_torch
from linearize.kernels.short_conv.recurrent import step_torch


def short_conv_streams(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    codes: Tensor | None = None,
    states: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor] | None = None,
    silu: bool = False,
    residual: bool = False,
    return_state: bool = False,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """`short_conv_reference` of up to three streams that share batch, tokens, taps and options, not heads or widths.

    y_t = act(bias + sum over j < W of weight[..., W - 1 - j] * x_{t-j}) (+ x_t). Accumulates in float32 (float64 for
    float64) whatever the inputs are; backward makes the result before the activation again instead of keeping it, and
    is deterministic.

    Args:
        inputs: each [B, T, H, D], one dtype.
        weights: each [H, D, W], W from 1 to 8.
        codes: [B, T] document number d of each token, non-decreasing along a row, or -1 - d where it is padding, which
            counts as a zero. Carried states belong to document 0. None: one document without padding.
        states: each [B, W - 1, H, D], the inputs before the first token, oldest first; None: zeros.
        biases: each [H, D], or None.
        silu: apply x * sigmoid(x) to the result.
        residual: add the input to the result (behind the activation).
        return_state: also give the new states, in the dtype of the old ones: the last W - 1 inputs, zeros for those of
            a document that is closed.

    Returns:
        The outputs, each [B, T, H, D] in the dtype of the inputs, and the new states or None.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(*inputs):
        from linearize.kernels.short_conv.operator import streams_triton

        return streams_triton(
            inputs, weights, codes=codes, states=states, biases=biases, silu=silu, residual=residual,
            return_state=return_state,
        )  # fmt: skip
    batch, tokens = inputs[0].shape[:2]
    numbers, seen = torch.zeros((batch, tokens), dtype=torch.int64, device=inputs[0].device), None
    if codes is not None:
        numbers, seen = torch.where(codes < 0, -1 - codes, codes), (codes >= 0)[..., None, None]
    outputs, finals = [], []
    for index, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        wide = torch.promote_types(x.dtype, torch.float32)
        own = x.to(wide) if seen is None else torch.where(seen, x.to(wide), 0.0)
        start = None if states is None else states[index]
        before = own.new_zeros(batch, weight.shape[-1] - 1, *x.shape[2:]) if start is None else start.to(wide)
        bias = None if biases is None else biases[index].to(wide)
        y, final = chunk_torch(own, weight.to(wide), numbers, before, bias=bias, silu=silu, residual=residual)
        outputs.append(y.to(x.dtype))
        finals.append(final.to(x.dtype if start is None else start.dtype))
    return outputs, finals if return_state else None


def short_conv_step_streams(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    *,
    valid: Tensor | None = None,
    biases: Sequence[Tensor] | None = None,
    silu: bool = False,
    residual: bool = False,
) -> list[Tensor]:
    """One token of up to three streams; the states move up by one in place. No graph; can be captured.

    Args:
        inputs: each [B, H, D]; rows may lie apart (a slice of a fused projection).
        weights: each [H, D, W].
        states: each [B, W - 1, H, D] contiguous, oldest first; written in place.
        valid: [B] bool, false where the token is padding, which counts as a zero and leaves the state as it is.
        biases, silu, residual: see `short_conv_streams`.

    Returns:
        The outputs, each [B, H, D] in the dtype of the inputs.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(*inputs):
        from linearize.kernels.short_conv.operator import convolve_step, covered

        covered(inputs, weights, states, biases)
        return convolve_step(inputs, weights, biases or [], states, valid, silu, residual)
    outputs = []
    for index, (x, weight, state) in enumerate(zip(inputs, weights, states, strict=True)):
        wide = torch.promote_types(x.dtype, torch.float32)
        own = x.to(wide) if valid is None else torch.where(valid[:, None, None], x.to(wide), 0.0)
        bias = None if biases is None else biases[index].to(wide)
        outputs.append(
            step_torch(own, weight.to(wide), state, bias=bias, silu=silu, residual=residual, valid=valid).to(
                x.dtype
            )
        )
    return outputs
