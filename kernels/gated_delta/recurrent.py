"""One token, in place on the state."""

from __future__ import annotations

from torch import Tensor


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> Tensor:
    """The state forgets, the value under the key is moved, the query reads.

    Args:
        q: [B, H, F].
        k: [B, M, F], of length one.
        v: [B, M, V].
        beta, log_decay: [B, M] (both zero for a token that nobody may see); log_decay None for no forgetting.
        state: [B, M, F, V], float32 or wider; written in place.

    Returns:
        [B, H, V].
    """
    if log_decay is not None:
        state.mul_(log_decay.exp()[..., None, None])
    held = k[:, :, None] @ state
    state.add_(k[..., None] * (beta[..., None, None] * (v[:, :, None] - held)))
    return (q.unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2)
