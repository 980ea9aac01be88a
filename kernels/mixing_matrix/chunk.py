"""The same in O(T) memory: tiles on CUDA, blocks of query rows that backward makes anew in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.kernels import dispatch
from linearize.kernels.mixing_matrix.plan import WIDEST
from linearize.kernels.mixing_matrix.reference import Kind, Products, Softmax, mixing_matrix_reference

BLOCK_ELEMENTS = 2**22
"""Weights of a block, B * H * R * T: 16 MB in float32, for each of the few tensors of its graph."""
FEWEST_ROWS = 16


def mixing_matrix_rows(kind: Kind, teacher: Softmax, student: Products, codes: Tensor | None) -> Tensor:
    """What each query's row of weights differs by; see `mixing_matrix_reference` for the arguments.

    Returns:
        [B, T, H], float32 or wider, with a graph to the student's tensors, of which O(T) bytes are kept.

    Raises:
        KernelError: Triton is asked for by name, and its kernels do not cover the call.
    """
    batch, tokens, heads = student.q.shape[:3]
    if dispatch.use_triton(teacher.q, teacher.k, student.q, student.k):
        from linearize.kernels.mixing_matrix.operator import mixing_matrix_triton

        fits = max(teacher.q.shape[-1], student.q.shape[-1]) <= WIDEST
        if fits or not dispatch.automatic():
            return mixing_matrix_triton(kind, teacher, student, codes)
    at_once = max(FEWEST_ROWS, BLOCK_ELEMENTS // max(1, batch * heads * tokens))
    made = []
    for start in range(0, max(tokens, 1), at_once):
        given = (kind, teacher, student, codes, slice(start, min(start + at_once, tokens)))
        # the scores of a block are made anew in backward, so that none outlives it
        made.append(
            checkpoint(mixing_matrix_reference, *given, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(made, 1)
