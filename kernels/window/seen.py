"""Which keys each query of a window sees: one run of keys that ends with its own, and a few pinned ones before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOWHERE = 2**30
"""Place of the first key of a query that sees nothing."""


@dataclass(frozen=True)
class Seen:
    """Query t stands at key `prefix` + t and sees the keys from `first` to itself, and `pins` keys from `pin` on.

    Documents, padding in front, terraces and a teacher's own window all come down to where a query's run begins, so
    that no mask is needed. Along a row neither `first` nor `pin` falls, but for `NOWHERE`.

    Attributes:
        window: the longest run.
        prefix: keys in front of the first query's own.
        first: [B or 1, T] int32, or None: the last `window` keys, of those that there are.
        pin: [B or 1, T] int32, or None without pinned keys.
        pins: how many are pinned; those behind a query are not seen.
    """

    window: int
    prefix: int = 0
    first: Tensor | None = None
    pin: Tensor | None = None
    pins: int = 0

    def places(self, tokens: int, device: torch.device) -> Tensor:
        """`first` [B or 1, T] int64, whether given or not."""
        if self.first is not None:
            return self.first.to(torch.int64)
        own = torch.arange(self.prefix, self.prefix + tokens, device=device)
        return (own - self.window + 1).clamp_min(0)[None]

    def mask(self, tokens: int, device: torch.device) -> Tensor:
        """[B or 1, T, prefix + T] bool, for the definition."""
        key = torch.arange(self.prefix + tokens, device=device)
        own = key[self.prefix :, None]
        visible = key >= self.places(tokens, device)[..., None]
        if self.pin is not None:
            pin = self.pin.to(torch.int64)[..., None]
            visible = visible | ((key >= pin) & (key < pin + self.pins))
        return visible & (key <= own)
