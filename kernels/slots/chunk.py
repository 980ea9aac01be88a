"""The same as two passes of gated linear attention with a softmax between them (Zhang et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_linear import gated_linear_chunk
from linearize.kernels.slots.reference import SlotState


def slots_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    writes: Tensor | None,
    log_decay: Tensor,
    docs: Tensor | None,
    state: SlotState,
    *,
    chunk: int = 64,
) -> tuple[Tensor, SlotState]:
    """Arguments and results of `slots_reference`; writes of None are 1 - exp(log_decay), docs of
    None one document.

    In the first pass the slots are value dimensions, each with its decay; in the second they are key dimensions. On
    CUDA both run in Triton (`operator.py`): q, k and v of one dtype, bfloat16, float16 or float32, the log decays
    float32 or narrower; the output comes in the dtype of v, the state in float32. Writes of None are the cheaper ones
    there.

    Args:
        chunk: tokens in a chunk of the torch form, a power of two.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(q, k, v):
        from linearize.kernels.slots.operator import slots_triton

        return slots_triton(q, k, v, writes, log_decay, docs, state)
    keys, values = state
    wide = keys.dtype
    log_decay = log_decay.to(wide)
    writes = -log_decay.expm1() if writes is None else writes.to(wide)
    scores, _, (keys, _) = gated_linear_chunk(
        q.to(wide), k.to(wide), writes, log_decay, docs, (keys, None), normalize=False, decay_values=True, chunk=chunk
    )  # fmt: skip
    weights, writes = scores.softmax(-1).to(v.dtype), writes.to(v.dtype)
    out, _, (values, _) = gated_linear_chunk(
        weights, writes, v, log_decay, docs, (values, None), normalize=False, chunk=chunk
    )
    return out, (keys, values)
