"""The step of a binary counter whose bits hold states, as a Fenwick tree's (Guo et al. 2025, arXiv 2506.04761)."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels import dispatch


def carry(states: Tensor, target: Tensor) -> None:
    """In place: all that lies below `target` goes there, and nothing stays below it.

    Triton: one launch, which a CUDA graph can hold, and which reads nothing but `target` where that is zero.

    Args:
        states: [B, L, ...], L states; float32 or wider.
        target: [B] integers below L; 0 where nothing is carried.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(states):
        from linearize.kernels.stretches import triton_carry

        triton_carry.covered(states)
        triton_carry.carried(states, target)
        return
    # where the host can look, it need not pass over every state for each token
    if states.is_cpu and not torch.compiler.is_compiling() and not bool(target.any()):
        return
    carry_reference(states, target)


def carry_reference(states: Tensor, target: Tensor) -> None:
    """As `carry`, over all states."""
    target = target[:, None]
    place = torch.arange(states.shape[1], device=states.device)
    apart = (..., *(None,) * (states.dim() - 2))
    below, there = (place < target)[apart], ((place == target) & (target > 0))[apart]
    moved = torch.where(below, states, 0).sum(1, keepdim=True)
    states.copy_(torch.where(below, 0, states) + torch.where(there, moved, 0))
