"""The same as two passes of gated linear attention with a softmax between them (Zhang et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels.gated_linear import gated_linear_chunk
from linearize.kernels.slots.reference import SlotState


def slots_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    writes: Tensor,
    log_decay: Tensor,
    docs: Tensor,
    state: SlotState,
    *,
    chunk: int = 64,
) -> tuple[Tensor, SlotState]:
    """Arguments and results of `slots_reference`; `chunk` is a power of two.

    In the first pass the slots are value dimensions, each with its decay; in the second they are key dimensions. On
    CUDA the second one runs in Triton; the first keeps the torch form, which is as linear in time and memory.
    """
    keys, values = state
    wide = keys.dtype
    scores, _, (keys, _) = gated_linear_chunk(
        q.to(wide),
        k.to(wide),
        writes.to(wide),
        log_decay.to(wide),
        docs,
        (keys, None),
        normalize=False,
        decay_values=True,
        chunk=chunk,
    )
    weights, writes = scores.softmax(-1).to(v.dtype), writes.to(v.dtype)
    out, _, (values, _) = gated_linear_chunk(
        weights, writes, v, log_decay, docs, (values, None), normalize=False, chunk=chunk
    )
    return out, (keys, values)
