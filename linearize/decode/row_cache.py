"""A cache whose rows are texts of their own: each at its own place, cleared, copied and left without touching another.

A converted layer's state is a row of tensors of fixed size, and counts for itself, so rows need nothing in common. Kept
softmax layers write their token's key at its row's place, and masks tell each row where its text ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from linearize.decode.cache import FixedKeys, FixedState, tensors
from linearize.mixers import Mixer, State


class Places:
    """Where the tokens of a call go: several of each row's text, or one of each.

    Attributes:
        rows: [B] int64 on the device, the rows' numbers.
        each: [B, T] int64 on the device, places of their tokens; those of padding lie behind the row's text.
        before: tokens of the longest of these texts before the call; models are given positions and masks and only ask
            whether there are any.
        valid: [B, T] bool, false on the padding in front of rows that have fewer tokens in the call; None: all have T.
    """

    room = None
    """A row's memory is known before any is made, see `Row`."""

    def __init__(self, rows: Tensor, each: Tensor, before: int, valid: Tensor | None = None) -> None:
        self.rows, self.each, self.before, self.valid = rows, each, before, valid


class RowState(FixedState):
    """A converted layer."""

    clock: Places  # type: ignore[assignment]

    def __init__(self, places: Places, length: int, state: State | None = None) -> None:
        super().__init__(places, length)  # type: ignore[arg-type]
        self.state, self.is_initialized = state, state is not None
        self.forgotten = places.before == 0

    def attend(self, mixer: Mixer, *args: Any, **kwargs: Any) -> Tensor:
        if self.clock.valid is not None:
            # what the rows have read before stands in front of the padding
            kwargs |= {"valid": self.clock.valid, "gaps": True}
        return super().attend(mixer, *args, **kwargs)

    def entered(self, valid: Tensor | None) -> tuple[State | None, Tensor | None]:
        return self.state, valid if self.clock.valid is None else self.clock.valid

    def mask_offset(self, tokens: int) -> int | None:
        return None

    def get_seq_length(self) -> int:
        return self.clock.before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.clock.before + query_length, 0


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
        rows = self.clock.rows[:, None]
        self.keys[rows, :, self.clock.each] = key_states.transpose(1, 2)
        self.values[rows, :, self.clock.each] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.clock.before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.clock.before + query_length, 0


@dataclass(frozen=True)
class Row:
    """What a row holds, told without the memory for it.

    Attributes:
        held: [1, ...] by layer and name, of the right shape and dtype; all their numbers are one and the same place.
        states: of each layer, whether it is a converted one.
    """

    held: dict[str, Tensor]
    states: list[bool]

    @classmethod
    def between(cls, short: Cache, longer: Cache, steps: int) -> Row:
        """As the first of two caches, and so many times more of what the second has more."""
        more, held = tensors(longer), {}
        for name, x in tensors(short).items():
            shape = [
                own + steps * (other - own) for own, other in zip(x.shape, more[name].shape, strict=True)
            ]
            held[name] = x.new_zeros(()).expand(shape)
        return cls(held, [isinstance(layer, RowState) for layer in short.layers])

    @property
    def bytes(self) -> int:
        """Memory that a row takes."""
        return sum(x.numel() * x.element_size() for x in self.held.values())


class RowCache:
    """The storage of so many rows, of which the first ones are a cache of transformers whenever they are needed.

    Args:
        like: what a row holds.
        rows: texts that fit.
        length: tokens that softmax layers hold.
    """

    def __init__(self, like: Row, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.held = {name: x.new_zeros(rows, *x.shape[1:]) for name, x in like.held.items()}
        self._kinds = like.states
        self._growing = {name for name in self.held if not self._kinds[int(name.partition(".")[0])]}
        self._numbers = torch.arange(rows, device=next(iter(self.held.values())).device)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(x.numel() * x.element_size() for x in self.held.values())

    def first(self, width: int, each: Tensor, before: int, valid: Tensor | None = None) -> Cache:
        """The first rows as a cache that shares the memory.

        Args:
            width: tokens of softmax layers that are looked at, at least those of the longest of these rows.
            each, before, valid: see `Places`; `each` may be written from outside.
        """
        rows = each.shape[0]
        places = Places(self._numbers[:rows], each, before, valid)
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

    def fill(self, row: int, source: RowCache, its: int, tokens: int) -> None:
        """Copy row `its` of another such cache, a text of so many tokens, into a row, which forgets what it held."""
        for name, x in source.held.items():
            target, own = self.held[name][row], x[its]
            if name in self._growing:  # [N, S, K]; what lies behind the text is masked
                target, own = target[:, :tokens], own[:, :tokens]
            target.copy_(own)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row of so many tokens over another."""
        self.fill(target, self, source, tokens)

    def zero(self, row: int, tokens: int | None = None) -> None:
        """Overwrite a row, or the first so many of its places: a masked value that is no number would still pass
        through a weight of zero."""
        for name, x in self.held.items():
            (x[row, :, :tokens] if name in self._growing else x[row]).zero_()

    def moved(self, cache: Cache) -> dict[str, Tensor]:
        """Tensors of `first`'s cache that are no longer the memory that it was given, by layer and name."""
        found = tensors(cache).items()
        return {name: x for name, x in found if x.data_ptr() != self.held[name].data_ptr()}
