"""Which tokens are the pinned first ones of each query's document."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Pinned:
    """Pinned tokens of a call, n to a document.

    Attributes:
        chosen: [B, T] bool, which of the new tokens are pinned.
        index: [B, T, n] int64, each query's pinned tokens among the n carried and the T new ones.
        visible: [B, T, n] bool, false where the query's document has not had so many tokens yet.
    """

    chosen: Tensor
    index: Tensor
    visible: Tensor

    def gather(self, carried: Tensor, new: Tensor) -> Tensor:
        """Keys or values, carried [B, n, N, K] and new [B, T, N, K] -> each query's own [B, T, n, N, K]."""
        rows = torch.arange(new.shape[0], device=new.device)[:, None, None]
        return torch.cat([carried.to(new.dtype), new], 1)[rows, self.index]


def pin(carried: Tensor, valid: Tensor, docs: Tensor) -> Pinned:
    """The first n valid tokens of every document, so that left padding does not count.

    Args:
        carried: [B, n] bool, which pinned slots document 0 has filled; the filled ones come first.
        valid: [B, T] bool, false on padding.
        docs: [B, T] int64 document numbers, non-decreasing.
    """
    slots, tokens = carried.shape[1], valid.shape[1]
    total = valid.to(torch.int64).cumsum(1)
    before = total - valid.to(torch.int64)
    opens = torch.cat([torch.zeros_like(docs[:, :1]), docs], 1).diff(dim=1) != 0
    # valid tokens before the document's first one; negative by what document 0 has had before
    base = torch.where(opens, before, -carried.sum(1, keepdim=True)).cummax(1).values
    order = torch.arange(slots, device=valid.device)
    wanted = base[..., None] + order + 1
    found = torch.searchsorted(total, wanted.flatten(1)).unflatten(1, (tokens, slots))
    old = wanted <= 0
    visible = old | (found <= torch.arange(tokens, device=valid.device)[:, None])
    index = torch.where(old, order, slots + found.clamp(max=tokens - 1))
    return Pinned(valid & (before - base < slots), index, visible)
