"""A row's last tokens, one or a few; nothing is written: the cache that holds the keys has taken their own already."""

from __future__ import annotations

from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.newest.reference import newest_reference


def newest_steps(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    newest: Tensor,
    seen: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """See `newest_reference`; in Triton only keys that are seen are read, each once for all its queries.

    Raises:
        KernelError: Triton is to run what it does not cover.
    """
    if dispatch.use_triton(q, keys, values):
        from linearize.kernels.newest.triton_step import covered, step

        covered(q, keys, values)
        numbers = [scaling, softcap or 0.0]
        return step(q.contiguous(), keys, values, newest.contiguous(), seen.contiguous(), numbers)
    return newest_reference(q, keys, values, newest, seen, scaling=scaling, softcap=softcap)


def newest_step(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    newest: Tensor,
    seen: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """The same of one token: q [B, H, K], newest and seen [B]; [B, H, V]."""
    given = q[:, None], keys, values, newest[:, None], seen[:, None]
    return newest_steps(*given, scaling=scaling, softcap=softcap)[:, 0]
