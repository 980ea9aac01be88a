"""Padding in the middle of a row, as the second turn of a padded batch has it: no part counts it.

A window of W tokens holds W tokens of the text, a convolution reaches over tokens of the text, and positions count
them: a row with padding is the row without. The chunked forms have the padding taken to the front of each row, and
what a state carries put behind it, so that tokens stand side by side; the one-token form leaves a state as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packing:
    """Rows whose padding has been taken to the front.

    Attributes:
        order: [B, T] int64, where in its row each token of the packed row stood.
        back: [B, T] int64, where each token of the row stands in the packed one.
    """

    order: Tensor
    back: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] as it came -> packed."""
        return _taken(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """[B, T, ...] packed -> as it came."""
        return _taken(x, self.back)


def packing(valid: Tensor) -> Packing:
    """How rows [B, T] of tokens and padding are packed; tokens keep their order."""
    order = valid.to(torch.int8).argsort(dim=1, stable=True)
    place = torch.arange(valid.shape[1], device=valid.device).expand_as(order)
    return Packing(order, torch.empty_like(order).scatter_(1, order, place))


def has_gaps(valid: Tensor) -> bool:
    """Whether padding stands between tokens [B, T]; waits for the device, and for compiled calls supposes so."""
    if torch.compiler.is_compiling():
        return True
    seen = valid.cumsum(1)
    return bool((~valid & (seen > 0) & (seen < seen[:, -1:])).any())


def leading(valid: Tensor) -> Tensor:
    """Padding in front of each row [B, T] -> [B]."""
    return (valid.cumsum(1) == 0).sum(1)


def behind(past: Tensor, new: Tensor, front: Tensor | None) -> Tensor:
    """What was carried [B, P, ...] before the tokens that come [B, T, ...], but behind the `front` [B] of them."""
    both = torch.cat([past, new], 1)
    if front is None:
        return both
    carried, front = past.shape[1], front[:, None]
    place = torch.arange(both.shape[1], device=both.device).expand(both.shape[0], -1)
    inner = torch.where(place < front + carried, place - front, place)
    return _taken(both, torch.where(place < front, place + carried, inner))


def _taken(x: Tensor, index: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
