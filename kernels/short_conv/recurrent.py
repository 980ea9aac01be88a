"""One token, in place on the last inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch


def short_conv_step(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    residual: bool = False,
) -> Tensor:
    """Convolve one input with those before it, which move up by one.

    Args:
        x: [B, H, D] (zero for a token that nobody may see).
        weight: [H, D, W].
        state: [B, W - 1, H, D], oldest first; written in place.
        bias, silu, residual: see `short_conv_reference`.

    Returns:
        [B, H, D].

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(x):
        from linearize.kernels.short_conv.operator import convolve_step, covered

        biases = None if bias is None else [bias]
        covered([x], [weight], [state], biases)
        return convolve_step([x], [weight], biases or [], [state], None, silu, residual)[0]
    return step_torch(x, weight, state, bias=bias, silu=silu, residual=residual)


def step_torch(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    residual: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """The torch form; rows where `valid` [B] is false keep their state."""
    inputs = torch.cat([state, x[:, None]], 1)
    y = torch.einsum("bwhd,hdw->bhd", inputs, weight)
    moved = inputs[:, 1:]
    state.copy_(moved if valid is None else torch.where(valid[:, None, None, None], moved, inputs[:, :-1]))
    y = y if bias is None else y + bias
    y = F.silu(y) if silu else y
    return y + x if residual else y
