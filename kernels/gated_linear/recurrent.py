"""One token, in place on the state."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch


def gated_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    sums: Tensor,
    norms: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    read_before: bool = False,
    decay_values: bool = False,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The state forgets, the key is added, the query reads; with `read_before` or a `bonus` it reads first.

    On CUDA one Triton launch, which allocates nothing but what it returns.

    Args:
        q: [B, H, F].
        k: [B, M, F] (zero, with zero log decay, for a token that nobody may see).
        v: [B, M, V].
        log_decay: [B, M], [B, M, F], or with `decay_values` [B, M, V]; None forgets nothing.
        sums, norms: [B, M, F, V], [B, M, F] or None, float32 or wider; written in place.
        bonus: [M, F]; implies `read_before`.
        live: [B, M]; where False the head holds zeros and its k is zero, and Triton does not touch it.

    Returns:
        numerator [B, H, V] in the dtype of v, denominator [B, H] in that of the norms (None without them).

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    read_before = read_before or bonus is not None
    if dispatch.use_triton(q, k, v, sums):
        from linearize.kernels.gated_linear.triton_step import covered, step

        covered(q, k, v, log_decay, sums, norms)
        kind = 0 if log_decay is None else 3 if decay_values else log_decay.dim() - 1
        out, total = step(q, k, v, log_decay, bonus, sums, norms, kind, read_before, live)
        return out, None if norms is None else total
    dtype, (q, k, v) = v.dtype, (x.to(sums.dtype) for x in (q, k, v))
    grouped = q.unflatten(1, (k.shape[1], -1))
    read = _read(grouped, sums, norms) if read_before else None
    if log_decay is not None:
        decay = (log_decay[..., None] if log_decay.dim() == 2 else log_decay).to(sums.dtype).exp()
        sums.mul_(decay[..., None, :] if decay_values else decay[..., None])
        if norms is not None:
            norms.mul_(decay)
    sums.addcmul_(k[..., None], v[:, :, None])
    if norms is not None:
        norms.add_(k)
    numerator, denominator = _read(grouped, sums, norms) if read is None else read
    if bonus is not None:
        own = (grouped * (bonus * k)[:, :, None]).sum(-1)
        numerator = numerator + own[..., None] * v[:, :, None]
        denominator = None if denominator is None else denominator + own
    numerator = numerator.to(dtype)
    return numerator.flatten(1, 2), None if denominator is None else denominator.flatten(1, 2)


def _read(q: Tensor, sums: Tensor, norms: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return q @ sums, None if norms is None else (q @ norms[..., None])[..., 0]
