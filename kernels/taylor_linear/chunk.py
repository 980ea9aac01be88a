"""The same in chunks, in O(T) memory; in Triton no feature of any token leaves the chip."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.chunks import at_least_float32
from linearize.kernels.gated_linear.reference import Gated, GatedState
from linearize.kernels.linear.chunk import torch_chunk
from linearize.kernels.taylor_linear.reference import taylor_features


def taylor_linear_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    docs: Tensor | None = None,
    valid: Tensor | None = None,
    state: GatedState | None = None,
    *,
    normalize: bool = True,
    chunk: int = 64,
) -> Gated:
    """Arguments and results of `taylor_linear_reference`, and None for one document, no padding, an empty state.

    On CUDA it runs in Triton (`operator.py`) for D of 8, 16 and 32: q, k and v of one dtype, bfloat16, float16 or
    float32; numerators come in the dtype of v, denominators and states in float32. Elsewhere the features of all
    tokens are made first, which takes F / D times the memory of q and k.

    Args:
        chunk: tokens in a chunk of the torch form.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(q, k, v):
        from linearize.kernels.taylor_linear.operator import taylor_linear_triton

        return taylor_linear_triton(q, k, v, scale, docs, valid, state, normalize=normalize)
    dtype = v.dtype
    q, k, v = at_least_float32(q, k, v)
    phi_q, phi_k = taylor_features(q, scale), taylor_features(k, scale)
    if valid is not None:
        phi_k = phi_k * valid[..., None, None].to(phi_k.dtype)
    v = v.repeat_interleave(k.shape[2] // v.shape[2], dim=2)
    if docs is None:
        docs = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    sums, norms = (None, None) if state is None else state
    if sums is None:
        sums = phi_k.new_zeros(len(k), *phi_k.shape[2:], v.shape[-1])
    if norms is None:
        norms = torch.zeros_like(sums[..., 0])
    numerator, denominator, after = torch_chunk(phi_q, phi_k, v, docs, (sums, norms), chunk)
    numerator = numerator.to(dtype)
    return (numerator, denominator, after) if normalize else (numerator, None, (after[0], None))
