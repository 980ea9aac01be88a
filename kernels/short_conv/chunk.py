"""The same for all tokens at once: one shifted product a tap; O(T) memory, no copy of the inputs in columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.short_conv.reference import last_inputs


def short_conv_chunk(
    x: Tensor,
    weight: Tensor,
    docs: Tensor,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `short_conv_reference`; one stream of `short_conv_streams`, which see.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(x):
        from linearize.kernels.short_conv.operator import streams_triton

        biases = None if bias is None else [bias]
        outputs, finals = streams_triton(
            [x],
            [weight],
            codes=docs,
            states=[state],
            biases=biases,
            silu=silu,
            residual=residual,
            return_state=True,
        )
        assert finals is not None
        return outputs[0], finals[0]
    return chunk_torch(x, weight, docs, state, bias=bias, silu=silu, residual=residual)


def chunk_torch(
    x: Tensor,
    weight: Tensor,
    docs: Tensor,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """The torch form: tensors of one dtype."""
    tokens, taps = x.shape[1], weight.shape[-1]
    inputs = torch.cat([state, x], 1)
    owners = torch.cat([docs.new_zeros(len(docs), taps - 1), docs], 1)
    y = x * weight[..., -1]
    for j in range(taps - 1):
        mine = torch.eq(owners[:, j : j + tokens], docs)[..., None, None].to(x.dtype)
        y = torch.addcmul(y, inputs[:, j : j + tokens] * mine, weight[..., j])
    y = y if bias is None else y + bias
    y = F.silu(y) if silu else y
    return y + x if residual else y, last_inputs(inputs, owners, taps)
