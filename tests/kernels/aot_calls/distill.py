"""Calls of distill whose launches are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from linearize.kernels.distill import Head, distill_loss, target_log_probs


def call(
    vocabulary: int,
    *,
    divergence: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gradient: bool = True,
) -> None:
    """A slice of sixteen tokens, forward and backward."""
    hidden = torch.zeros(16, 16, dtype=dtype, requires_grad=gradient)
    head = Head(torch.zeros(vocabulary, 16, dtype=dtype), softcap=softcap)
    targets = torch.zeros(16, dtype=torch.int64)
    if not gradient:
        target_log_probs(hidden, head, targets, targets == 0)
        return
    teacher = (hidden.detach(), head) if divergence else None
    distill_loss(
        hidden, head, targets, torch.ones(16), next_token=1.0, divergence=divergence, teacher=teacher
    ).backward()


CALLS: dict[str, Callable[[], None]] = {
    "both losses, 49,152": partial(call, 49_152),
    "both losses, 50,257": partial(call, 50_257),
    "next token, 128,256": partial(call, 128_256, divergence=0.0),
    "both losses, 256,000, capped": partial(call, 256_000, softcap=30.0),
    "next token, capped": partial(call, 256_000, divergence=0.0, softcap=30.0),
    "small vocabulary": partial(call, 512),
    "float32": partial(call, 49_152, dtype=torch.float32),
    "log-probabilities": partial(call, 49_152, gradient=False),
}
