"""The same over slices of tokens: two slices of logits exist at a time, and the gradient takes the student's place.

What is decided here:

- Gradients are made with the loss, since a slice's logits are gone afterwards; backward only multiplies them. Those of
  the head are made if it trains alone, and add up over the slices in float32.
- Logits are rounded to the compute dtype, as the head's matrix gives them; scale, cap, softmax and losses are float32
  (float64 for float64).
- liger-kernel's fused losses do the same for cross-entropy; its divergence knows no soft cap, does not take both losses
  in one pass over the vocabulary, and gives a frozen head a gradient that nobody reads, so no dependency is worth it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.distill.operator import distill, token_losses
from linearize.kernels.distill.reference import Head
from linearize.kernels.distill.slices import slice_tokens

__all__ = ["distill_loss", "slice_tokens", "target_log_probs"]


def distill_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    weights: Tensor,
    *,
    next_token: float = 0.0,
    divergence: float = 0.0,
    teacher: tuple[Tensor, Head] | None = None,
    dtype: torch.dtype | None = None,
    at_once: int | None = None,
) -> Tensor:
    """`distill_reference` in the memory of a slice, differentiable once in `hidden` and the student's head.

    Args:
        hidden, head, targets, weights, next_token, divergence, teacher: see `distill_reference`.
        dtype: of the matrix products and of the logits as they leave the head; that of `hidden` by default. Hidden
            states and weights of another one are cast, the gradients cast back.
        at_once: tokens in a slice; chosen by the vocabulary's size by default.

    Returns:
        Scalar float32 (float64 for float64).

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    assert not divergence or teacher is not None, "the teacher is missing"
    states, theirs = teacher if teacher is not None and divergence else (None, None)
    grad = torch.is_grad_enabled()
    needs = [
        grad and hidden.requires_grad,
        grad and head.weight.requires_grad,
        grad and head.bias is not None and head.bias.requires_grad,
    ]
    return distill(
        hidden,
        head.weight,
        head.bias,
        None if states is None else states.detach(),
        None if theirs is None else theirs.weight.detach(),
        None if theirs is None or theirs.bias is None else theirs.bias.detach(),
        targets,
        weights.detach(),
        [next_token, divergence, *_shape(head), *_shape(theirs or head)],
        needs,
        dtype or hidden.dtype,
        at_once or slice_tokens(len(head.weight), hidden.device),
    )[0]


def target_log_probs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    seen: Tensor,
    *,
    dtype: torch.dtype | None = None,
    at_once: int | None = None,
) -> Tensor:
    """Log-probability of each token's target, without a graph and in the memory of a slice.

    Args:
        hidden: [N, D].
        head: of the model.
        targets: [N] int64.
        seen: [N] bool, false where there is no target: 0 there.
        dtype, at_once: see `distill_loss`.

    Returns:
        [N] float32 (float64 for float64).

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    with torch.no_grad():
        return -token_losses(
            hidden,
            head.weight,
            head.bias,
            targets,
            seen.to(torch.float32),
            [1.0, 0.0, *_shape(head), *_shape(head)],
            dtype or hidden.dtype,
            at_once or slice_tokens(len(head.weight), hidden.device),
        )


def _shape(head: Head) -> list[float]:
    """Scale and soft cap, 0 for none."""
    return [float(head.scale), float(head.softcap or 0.0)]
