"""The tensors of one call of a mixer's, as its forms hand them on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linearize.mixers.beside import Beside
from linearize.mixers.padding import Packing, packing


class Given(NamedTuple):
    """What the forms of a mixer, and those who call it part by part, take of a text; a tuple, which compiles.

    Attributes:
        q, k, v: [B, T, H, K], [B, T, N, K], [B, T, N, V].
        valid: [B, T] bool, false on padding, or None for no padding.
        docs: [B, T] document numbers, or None for one document.
        beside: what else a mixer reads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None = None
    docs: Tensor | None = None
    beside: Beside = Beside()

    def packed(self, valid: Tensor) -> tuple[Given, Packing]:
        """With the padding of every row, where `valid` [B, T] is false, taken to its front, and how to take it back."""
        by = packing(valid)
        q, k, v = by.pack(self.q), by.pack(self.k), by.pack(self.v)
        docs = None if self.docs is None else by.pack(torch.where(valid, self.docs, 0))
        return Given(q, k, v, by.pack(valid), docs, self.beside.packed(by)), by
