"""A cache whose rows are texts of their own: each at its own place, cleared, copied and left without touching another.

A converted layer's state is a row of tensors of fixed size, and counts for itself, so rows need nothing in common. Kept
softmax layers write their token's key at its row's place, and masks tell each row where its text ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from linearize.decode.cache import FixedKeys, FixedState, tensors
from linearize.mixers import State


class Places:
    """Where the tokens of a call go: a piece of one text, or one token of each of several.

    Attributes:
        first: place of the piece's first token, or None where every row gets one token.
        rows, each: [B] int64 on the device, the rows' numbers and their tokens' places.
    """

    def __init__(self, first: int | None, rows: Tensor, each: Tensor) -> None:
        self.first, self.rows, self.each = first, rows, each

    @property
    def length(self) -> int:
        """Tokens before those of the call; models are given positions and masks and only ask whether there are any."""
        return 1 if self.first is None else self.first


class RowState(FixedState):
    """A converted layer; no token of a call is padding."""

    clock: Places  # type: ignore[assignment]

    def __init__(self, places: Places, length: int, state: State | None = None) -> None:
        super().__init__(places, length)  # type: ignore[arg-type]
        self.state, self.is_initialized = state, state is not None

    def mask_offset(self, tokens: int) -> int | None:
        return None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.clock.length + query_length, 0


class RowKeys(FixedKeys):
    """A kept softmax layer: keys and values [B, N, length, K]."""

    clock: Places  # type: ignore[assignment]

    def __init__(
        self, places: Places, length: int, keys: Tensor | None = None, values: Tensor | None = None
    ) -> None:
        super().__init__(places, length)  # type: ignore[arg-type]
        if keys is not None and values is not None:
            self.keys, self.values, self.is_initialized = keys, values, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        first = self.clock.first
        if first is None:
            self.keys[self.clock.rows, :, self.clock.each] = key_states[:, :, 0]
            self.values[self.clock.rows, :, self.clock.each] = value_states[:, :, 0]
            return self.keys, self.values
        end = first + key_states.shape[2]
        self.keys[:, :, first:end].copy_(key_states)
        self.values[:, :, first:end].copy_(value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.clock.length + query_length, 0


class RowCache:
    """The storage of so many rows, of which the first ones are a cache of transformers whenever they are needed.

    Args:
        like: a cache of one row that has read a token, so that names, shapes and dtypes of its states are known.
        rows: texts that fit.
        length: tokens that softmax layers hold.
    """

    def __init__(self, like: Cache, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.held = {name: x.new_zeros(rows, *x.shape[1:]) for name, x in tensors(like).items()}
        self._kinds = [isinstance(layer, RowState) for layer in like.layers]
        self._growing = {name for name in self.held if not self._kinds[int(name.partition(".")[0])]}
        self._numbers = torch.arange(rows, device=next(iter(self.held.values())).device)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(x.numel() * x.element_size() for x in self.held.values())

    def first(self, rows: int, width: int, each: Tensor) -> Cache:
        """The first rows as a cache that shares the memory.

        Args:
            rows: how many.
            width: tokens of softmax layers that are looked at, at least those of the longest of these rows.
            each: [rows] places of the tokens that come, on the device; written from outside.
        """
        places = Places(None, self._numbers[:rows], each)
        layers: list[Any] = []
        for index, is_state in enumerate(self._kinds):
            prefix = f"{index}."
            own = {
                name.removeprefix(prefix): x[:rows]
                for name, x in self.held.items()
                if name.startswith(prefix)
            }
            if is_state:
                layers.append(RowState(places, self.length, State(own)))
            else:
                keys, values = own["keys"][:, :, :width], own["values"][:, :, :width]
                layers.append(RowKeys(places, self.length, keys, values))
        return Cache(layers=layers)

    def fill(self, row: int, source: Cache, tokens: int) -> None:
        """Copy the text of another cache, of one row and so many tokens, into a row, which forgets what it held."""
        self._copy(row, ((name, x[0]) for name, x in tensors(source).items()), tokens)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row of so many tokens over another."""
        self._copy(target, ((name, x[source]) for name, x in self.held.items()), tokens)

    def zero(self, row: int) -> None:
        """Overwrite a row: a masked value that is no number would still pass through a weight of zero."""
        for x in self.held.values():
            x[row].zero_()

    def moved(self, cache: Cache) -> list[str]:
        """Tensors of `first`'s cache that are no longer the memory that it was given, by layer and name."""
        return [name for name, x in tensors(cache).items() if x.data_ptr() != self.held[name].data_ptr()]

    def _copy(self, row: int, source: Iterable[tuple[str, Tensor]], tokens: int) -> None:
        for name, x in source:
            target = self.held[name][row]
            if name in self._growing:  # [N, S, K]; what lies behind the text is masked
                target, x = target[:, :tokens], x[:, :tokens]
            target.copy_(x)
