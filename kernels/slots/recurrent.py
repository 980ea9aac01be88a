"""One token, in place on the slots."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels.gated_linear import gated_linear_step


def slots_step(
    q: Tensor, k: Tensor, v: Tensor, writes: Tensor, log_decay: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The slots forget and take the token, the query reads.

    Args:
        q: [B, H, K].
        k, v: [B, M, K], [B, M, V].
        writes, log_decay: [B, M, S] (both zero for a token that nobody may see).
        keys, values: the slots, [B, M, K, S] and [B, M, S, V], float32 or wider; written in place.

    Returns:
        [B, H, V].
    """
    scores, _ = gated_linear_step(q, k, writes, log_decay, keys, decay_values=True)
    return gated_linear_step(scores.softmax(-1), writes, v, log_decay, values)[0]
