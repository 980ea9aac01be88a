"""Decays between the ends of a chunk and its tokens, and from token to token where a head has one decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Decay:
    """Decays of chunks of C tokens; X is F, V, or 1 for one decay a head.

    Sums of log decays are built up from their own terms and never as a difference of longer sums, so a weak decay
    beside a strong one keeps its digits.

    Attributes:
        log_decay: [..., C, X], at most zero.
        read_before: whether token t reads the state as it was before its own decay and key.
    """

    log_decay: Tensor
    read_before: bool = False

    @property
    def from_start(self) -> Tensor:
        """Decay from the chunk's start to each reader [..., C, X]."""
        terms = F.pad(self.log_decay[..., :-1, :], (0, 0, 1, 0)) if self.read_before else self.log_decay
        return terms.cumsum(-2).exp()

    @property
    def to_end(self) -> Tensor:
        """Decay from each writer to the chunk's end [..., C, X]."""
        later = F.pad(self.log_decay[..., 1:, :], (0, 0, 0, 1))
        return later.flip(-2).cumsum(-2).flip(-2).exp()

    @property
    def whole(self) -> Tensor:
        """Decay over the chunk [..., X]."""
        return self.log_decay.sum(-2).exp()

    @property
    def between(self) -> Tensor:
        """Decay from every token to every later reader [..., C, C], zero to earlier ones; for X = 1."""
        chunk = self.log_decay.shape[-2]
        earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=self.log_decay.device).tril(-1)
        sums = (self.log_decay * earlier).cumsum(-2)  # of decays s < j <= t
        if self.read_before:
            sums = F.pad(sums[..., :-1, :], (0, 0, 1, 0))
        seen = torch.ones_like(earlier).tril(-1 if self.read_before else 0)
        return sums.masked_fill(~seen, -torch.inf).exp()
