"""One token, in place on the state."""

from __future__ import annotations

from torch import Tensor


def generalized_delta_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor
) -> Tensor:
    """What the state holds under a is found, the state decays, takes it under b and the value under k; the query reads.

    Args:
        q: [B, H, F].
        k, a, b, log_decay: [B, M, F] (k, b and log_decay zero for a token that nobody may see).
        v: [B, M, V].
        state: [B, M, F, V], float32 or wider; written in place.

    Returns:
        [B, H, V].
    """
    held = a[:, :, None] @ state
    state.mul_(log_decay.exp()[..., None]).add_(b[..., None] * held).addcmul_(k[..., None], v[:, :, None])
    return (q.unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2)
