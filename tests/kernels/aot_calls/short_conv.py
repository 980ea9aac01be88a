"""Calls of short_conv whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.short_conv import short_conv_step_streams, short_conv_streams

NARROW = torch.bfloat16
SIZES = {64: [(16, 64), (4, 64), (4, 64)], 128: [(8, 128), (2, 128), (2, 128)]}
"""Heads and widths of q, k and v."""


def call(
    dim: int,
    taps: int = 4,
    *,
    tokens: int = 128,
    streams: int = 3,
    codes: bool = False,
    bias: bool = False,
    silu: bool = False,
    carried: bool = False,
    dtype: torch.dtype = NARROW,
) -> None:
    """Forward and backward."""
    sizes = SIZES[dim][:streams]
    inputs = [torch.zeros(1, tokens, *size, dtype=dtype, requires_grad=True) for size in sizes]
    weights = [torch.zeros(*size, taps, requires_grad=True) for size in sizes]
    biases = [torch.zeros(*size, requires_grad=True) for size in sizes] if bias else None
    states = [torch.zeros(1, taps - 1, *size, dtype=dtype) for size in sizes] if carried else None
    given = torch.zeros(1, tokens, dtype=torch.int32) if codes else None
    outputs, _ = short_conv_streams(
        inputs, weights, codes=given, states=states, biases=biases, silu=silu, return_state=carried
    )
    sum(x.float().sum() for x in outputs).backward()


def step(dim: int, *, valid: bool = False, silu: bool = False) -> None:
    """One token."""
    sizes = SIZES[dim]
    with torch.no_grad():
        short_conv_step_streams(
            [torch.zeros(2, *size, dtype=NARROW) for size in sizes],
            [torch.zeros(*size, 4) for size in sizes],
            [torch.zeros(2, 3, *size, dtype=NARROW) for size in sizes],
            valid=torch.ones(2, dtype=torch.bool) if valid else None,
            silu=silu,
        )


CALLS: dict[str, Callable[[], None]] = {
    "plain": partial(call, 64),
    "documents": partial(call, 128, codes=True),
    "documents, activation": partial(call, 64, codes=True, silu=True),
    "activation": partial(call, 64, silu=True),
    "activation, bias": partial(call, 128, silu=True, bias=True),
    "prefill": partial(call, 64, codes=True, silu=True, carried=True),
    "one token": partial(call, 64, tokens=1, codes=True, silu=True, carried=True),
    "eight taps, activation": partial(call, 64, 8, silu=True),
    "two taps, one stream": partial(call, 64, 2, streams=1),
    "float32": partial(call, 64, codes=True, silu=True, dtype=torch.float32),
    "step": partial(step, 64),
    "step, activation, padding": partial(step, 128, valid=True, silu=True),
}
