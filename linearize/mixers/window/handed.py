"""What a window hands on to the recurrent branch, and in which order keys are added and queries read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.mixers.base import Partial


@dataclass
class Order:
    """The one sequence that the recurrent branch runs over when keys and queries do not stand side by side.

    A slot holds one key, with a query that nobody asks, or one query, with a key that nobody sees; a query reads what
    the slots before it have added.

    Attributes:
        keys: [B, S] int64, slot of each key handed on.
        queries: [B, T] int64, slot of each query, increasing.
        docs: [B, S + T] int64, document number of each slot.
    """

    keys: Tensor
    queries: Tensor
    docs: Tensor

    def place_keys(self, x: Tensor) -> Tensor:
        """Keys' numbers [B, S, ...] -> [B, S + T, ...], zero in the queries' slots."""
        return self._place(x, self.keys)

    def place_queries(self, x: Tensor) -> Tensor:
        """Queries' numbers [B, T, ...] -> [B, S + T, ...], zero in the keys' slots."""
        return self._place(x, self.queries)

    def take(self, partial: Partial) -> Partial:
        """The recurrent branch's answer in every slot -> the queries' answers [B, T, H, V]."""
        rows = torch.arange(self.queries.shape[0], device=self.queries.device)[:, None]
        wanted = (partial.numerator, partial.denominator, partial.stabilizer)
        numerator, denominator, stabilizer = (None if x is None else x[rows, self.queries] for x in wanted)
        assert numerator is not None
        return Partial(numerator, denominator, stabilizer)

    def _place(self, x: Tensor, slots: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        return x.new_zeros(*self.docs.shape, *x.shape[2:]).index_put((rows, slots), x)


@dataclass
class Handed:
    """Keys for the recurrent branch: in `chunked` one at each query's place unless there is an `order`.

    In `step` they are what is added before the query reads, in this order: one, none, or several.

    Attributes:
        k, v: [B, S, N, K], [B, S, N, V].
        valid: [B, S], false where nothing is handed on or the key is padding or of an earlier document.
        lag: tokens since the key at a query's place came.
        position: [B, S] int64, the keys' own positions in their document, where no one lag says them.
        order: see `Order`.
    """

    k: Tensor
    v: Tensor
    valid: Tensor
    lag: int = 0
    position: Tensor | None = None
    order: Order | None = None
