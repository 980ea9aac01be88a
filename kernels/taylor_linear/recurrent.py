"""One token, in place on the state."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.gated_linear.recurrent import gated_linear_step
from linearize.kernels.taylor_linear.reference import taylor_features


def taylor_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sums: Tensor,
    norms: Tensor | None = None,
    *,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The key is added, then the query reads; on CUDA one Triton launch.

    Args:
        q: [B, H, D].
        k: [B, M, D].
        v: [B, N, V].
        scale: factor on q.k.
        sums, norms: [B, M, F, V], [B, M, F] or None, float32 or wider; written in place. F as in `taylor_features`.
        valid: [B] bool, false where nobody may see the key, or None.

    Returns:
        numerator [B, H, V] in the dtype of v, denominator [B, H] in that of the norms (None without them).

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(q, k, v, sums):
        from linearize.kernels.taylor_linear.triton_step import covered, step

        covered(q, k, v, sums, norms)
        out, total = step(q, k, v, scale, sums, norms, valid)
        return out, None if norms is None else total
    phi_q, phi_k = (taylor_features(x.to(sums.dtype), scale) for x in (q, k))
    if valid is not None:
        phi_k = phi_k * valid[:, None, None].to(phi_k.dtype)
    v = v.repeat_interleave(k.shape[1] // v.shape[1], dim=1)
    return gated_linear_step(phi_q, phi_k, v, None, sums, norms)
