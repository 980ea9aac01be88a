"""One token, in place on the slots."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_linear import gated_linear_step


def slots_step(
    q: Tensor, k: Tensor, v: Tensor, writes: Tensor | None, log_decay: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The slots forget and take the token, the query reads. On CUDA one Triton launch.

    Args:
        q: [B, H, K].
        k, v: [B, M, K], [B, M, V].
        writes, log_decay: [B, M, S] (both zero for a token that nobody may see); writes of None are 1 - exp(log_decay).
        keys, values: the slots, [B, M, K, S] and [B, M, S, V], float32 or wider; written in place.

    Returns:
        [B, H, V] in the dtype of v.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(q, k, v, keys):
        from linearize.kernels.slots.triton_step import covered, step

        covered(q, k, v, writes, log_decay, keys, values)
        return step(q, k, v, writes, log_decay, keys, values)
    writes = -log_decay.expm1() if writes is None else writes
    scores, _ = gated_linear_step(
        q.to(keys.dtype), k, writes.to(keys.dtype), log_decay, keys, decay_values=True
    )
    return gated_linear_step(scores.softmax(-1), writes, v, log_decay, values)[0]
