"""One token, in place on the state."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch


def generalized_delta_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor
) -> Tensor:
    """What the state holds under a is found, the state decays, takes it under b and the value under k; the query reads.

    Triton: one launch, nothing read back, nothing allocated but the output, so a CUDA graph can hold it.

    Args:
        q: [B, H, F].
        k, a, b, log_decay: [B, M, F] (k, b and log_decay zero for a token that nobody may see).
        v: [B, M, V].
        state: [B, M, F, V], float32 or wider; written in place.

    Returns:
        [B, H, V], in Triton in the dtype of v.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(q, k, v, state):
        from linearize.kernels.generalized_delta.triton_step import covered, step

        covered(q, k, v, a, b, log_decay, state)
        return step(*(x.contiguous() for x in (q, k, v, a, b, log_decay)), state)
    held = a[:, :, None] @ state
    state.mul_(log_decay.exp()[..., None]).add_(b[..., None] * held).addcmul_(k[..., None], v[:, :, None])
    return (q.unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2)
