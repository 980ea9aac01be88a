"""The definition: a loop over tokens and taps; float64 in, float64 out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    docs: Tensor,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """y_t = sum over j < W of weight[..., W - 1 - j] * x_{t-j}: the last tap is the token's own.

    Taps never reach into an earlier document. Tokens that nobody may see (padding) come as zeros; with a bias their
    output is not zero, so it must be masked once more behind the convolution.

    Args:
        x: [B, T, H, D].
        weight: [H, D, W].
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        state: [B, W - 1, H, D], the inputs before the first token, oldest first, zero where there were none.
        bias: [H, D].
        silu: apply x * sigmoid(x) to the result.
        residual: add the input to the result (behind the activation).

    Returns:
        y [B, T, H, D] and the new state: the last W - 1 inputs, zeros for those of a document that is closed.
    """
    taps = weight.shape[-1]
    inputs = torch.cat([state, x], 1)
    owners = torch.cat([docs.new_zeros(len(docs), taps - 1), docs], 1)
    outputs = []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, t]) if bias is None else bias.expand_as(x[:, t])
        for j in range(taps):
            mine = (owners[:, t + j] == docs[:, t])[:, None, None].to(x.dtype)
            y = y + weight[..., j] * mine * inputs[:, t + j]
        y = F.silu(y) if silu else y
        outputs.append(y + x[:, t] if residual else y)
    return torch.stack(outputs, 1) if outputs else x, last_inputs(inputs, owners, taps)


def last_inputs(inputs: Tensor, owners: Tensor, taps: int) -> Tensor:
    """The state behind `inputs` [B, W - 1 + T, H, D] that belong to the documents `owners` [B, W - 1 + T]."""
    first = inputs.shape[1] - taps + 1
    mine = owners[:, first:] == owners[:, -1:]
    return inputs[:, first:] * mine[..., None, None].to(inputs.dtype)
