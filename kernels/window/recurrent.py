"""One token against the last keys of a window and its pinned ones, in place on the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.window.merge import add_sink, merge
from linearize.kernels.window.reference import Weighted, window_reference


@dataclass(frozen=True)
class Held:
    """Pinned keys, then a ring in which token n stands at n % slots; all tensors are written.

    Attributes:
        k, v: [B, first + slots, N, K or V].
        valid: [B, first + slots] bool.
        next: [B, H] int64, n of the token that comes, the same number for each head.
        first: pinned keys to a document.
    """

    k: Tensor
    v: Tensor
    valid: Tensor
    next: Tensor
    first: int = 0

    @property
    def slots(self) -> int:
        """Of the ring: one more than the keys that a query may see."""
        return self.k.shape[1] - self.first


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    *,
    valid: Tensor,
    span: int,
    scaling: float,
    softcap: float | None = None,
    reach: Tensor | None = None,
    sink: Tensor | None = None,
    turned: Tensor | None = None,
) -> Weighted:
    """The softmax over the last `span` tokens and the pinned ones, the new token's own key included; torch.

    A document's first tokens go among the pinned keys, the others into the ring. Padding leaves everything as it is.

    Args:
        q: [B, 1, H, K].
        k, v: [B, 1, N, K or V].
        valid: [B, 1] bool, false on padding.
        reach: [B, 1] int64, tokens that the query sees, at most `span`, which all see without it.
        sink: [H] or None.
        turned: [B, 1, H, K], what the pinned keys are asked in place of q, or None.

    Returns:
        numerator [B, 1, H, V], denominator and maximum [B, 1, H].
    """
    first, slots = held.first, held.slots
    rows = torch.arange(q.shape[0], device=q.device)
    slot = held.next[:, 0] % slots
    age = (slot[:, None] - torch.arange(slots, device=q.device)) % slots
    slot = first + slot
    if first:
        pinned = held.valid[:, :first].sum(1)
        held.valid.scatter_(1, slot[:, None], False)
        slot = torch.where(valid[:, 0] & (pinned < first), pinned, slot)
    held.k[rows, slot], held.v[rows, slot] = k[:, 0].to(held.k.dtype), v[:, 0].to(held.v.dtype)
    held.valid[rows, slot] = valid[:, 0]
    held.next.add_(valid.to(torch.int64))
    seen = held.valid[:, first:] & (age < (span if reach is None else reach))
    keys, values = held.k.to(q.dtype), held.v.to(q.dtype)

    def read(asks: Tensor, kept: slice, visible: Tensor) -> Weighted:
        return window_reference(
            asks, keys[:, kept], values[:, kept], visible[:, None], scaling=scaling, softcap=softcap
        )

    if turned is None:
        weighted = read(q, slice(None), torch.cat([held.valid[:, :first], seen], 1) if first else seen)
    else:
        weighted = read(q, slice(first, None), seen)
        weighted = merge(weighted, read(turned, slice(first), held.valid[:, :first]))
    return weighted if sink is None else add_sink(weighted, sink)
