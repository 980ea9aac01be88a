"""One token, in place on the state."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    live: Tensor | None = None,
) -> Tensor:
    """The state forgets, the value under the key is moved, the query reads.

    Triton: one launch, nothing read back, nothing allocated but the output, so a CUDA graph can hold it.

    Args:
        q: [B, H, F].
        k: [B, M, F], of length one, M dividing H.
        v: [B, M, V].
        beta: [B, M] (zero, with zero log decay, for a token that nobody may see).
        log_decay: [B, M] or [B, M, F]; None for no forgetting.
        state: [B, M, F, V], float32 or wider; written in place.
        live: [B, M]; where False the head holds zeros and its v is zero, and Triton does not touch it.

    Returns:
        [B, H, V], in Triton in the dtype of v.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(q, k, v, state):
        from linearize.kernels.gated_delta import triton_step

        triton_step.covered(q, k, v, state)
        decay = None if log_decay is None else log_decay.contiguous()
        return triton_step.step(
            q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous(), decay, state, live
        )
    return _torch(q, k, v, beta, log_decay, state)


def _torch(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    if log_decay is not None:
        decay = log_decay.exp()[..., None]
        state.mul_(decay if decay.dim() == 4 else decay[..., None])
    held = k[:, :, None] @ state
    state.add_(k[..., None] * (beta[..., None, None] * (v[:, :, None] - held)))
    return (q.unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2)
