"""What a mixer reads beside q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from linearize.mixers.padding import Packing

Plain = tuple[Tensor, Tensor]
"""q [B, T, H, K] and k [B, T, N, K] before the rotary embedding."""


class Beside(NamedTuple):
    """Each is None where nobody gave it.

    Attributes:
        hidden: [B, T, D], the layer's input.
        plain: q and k before the rotary embedding.
        sink: [H], the logit of the teacher's own attention sink.
        first: [B, T, N, V], the values of the model's first converted layer.
    """

    hidden: Tensor | None = None
    plain: Plain | None = None
    sink: Tensor | None = None
    first: Tensor | None = None

    def each(self, form: Callable[[Tensor], Tensor]) -> Beside:
        """With a function of every tensor in its place."""
        plain = None if self.plain is None else (form(self.plain[0]), form(self.plain[1]))
        hidden, sink, first = (None if x is None else form(x) for x in (self.hidden, self.sink, self.first))
        return Beside(hidden, plain, sink, first)

    def packed(self, by: Packing) -> Beside:
        """With the padding of every row taken to its front."""
        plain = None if self.plain is None else (by.pack(self.plain[0]), by.pack(self.plain[1]))
        hidden, first = (None if x is None else by.pack(x) for x in (self.hidden, self.first))
        return Beside(hidden, plain, self.sink, first)
