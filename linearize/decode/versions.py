"""What converted layers hold behind each token of a round, so that every row goes on from the one that it keeps.

A draft makes a round's tokens one by one, and its states behind each of them are at hand when it is known how many are
taken: nothing has to be computed again. States of all layers that are alike lie in one tensor, so that one launch
copies all of them. Of a ring of keys a token writes one slot, and only what stood there is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from linearize.mixers import Mixer, State
from linearize.mixers.window.ring import RingWindow

KEYS = ("window_k", "window_v")
"""Of a ring: written in the slot of the token that comes, or among the pinned ones, which are not valid before."""
NEXT = "window_next"
ALIGNED = 16
"""Bytes to which each layer's tensor is aligned, as if it were alone: kernels are compiled for that."""


class Same:
    """One tensor of the state in each of several layers, as one.

    Args:
        held: state and name of each; the tensors become parts of one.
        tokens: of a round.
    """

    def __init__(self, held: list[tuple[State, str]], tokens: int) -> None:
        like = held[0][0][held[0][1]]
        each = max(ALIGNED // like.element_size(), 1)
        size = -(-like.numel() // each) * each
        flat = like.new_zeros(len(held), size)
        self.now = flat[:, : like.numel()].unflatten(1, like.shape)
        """[L, B, ...]."""
        for part, (state, name) in zip(self.now, held, strict=True):
            part.copy_(state[name])
            state[name] = part
        self.layers = torch.arange(len(held), device=like.device)[:, None]
        self.rows = torch.arange(like.shape[0], device=like.device)
        self.before = self.saved(like, len(held), tokens)

    def saved(self, like: Tensor, layers: int, tokens: int) -> Tensor:
        """[tokens, L, B, ...], for what is kept of each token's turn."""
        return like.new_zeros(tokens, layers, *like.shape)

    def save(self, token: int) -> None:
        """Keep what the round's token of this number is about to change."""
        self.before[token].copy_(self.now)

    def take(self, kept: Tensor, tokens: int) -> None:
        """Go back to what was there behind the first `kept` [B] of so many tokens."""
        picked = self.before[kept.clamp_max(tokens - 1), self.layers, self.rows]
        all_of_them = (kept >= tokens).view(1, -1, *[1] * (self.now.dim() - 2))
        self.now.copy_(torch.where(all_of_them, self.now, picked))


class Slots(Same):
    """A ring's keys or values: of these the slots that a round's tokens write.

    Args:
        held, tokens: see `Same`; the rings have as many slots at least.
        count: of the same layers, numbers of the tokens that come, see `RingWindow`.
        first: slots of pinned keys, in front of the ring's.
    """

    def __init__(self, held: list[tuple[State, str]], tokens: int, count: Same, first: int) -> None:
        super().__init__(held, tokens)
        self.count, self.first = count, first
        self.slots = self.now.shape[2] - first
        self.places = torch.zeros(tokens, *self.now.shape[:2], dtype=torch.int64, device=self.now.device)

    def saved(self, like: Tensor, layers: int, tokens: int) -> Tensor:
        return like.new_zeros(tokens, layers, like.shape[0], *like.shape[2:])

    def save(self, token: int) -> None:
        place = self.first + self.count.now[:, :, 0] % self.slots
        self.places[token].copy_(place)
        self.before[token].copy_(self.now[self.layers, self.rows, place])

    def take(self, kept: Tensor, tokens: int) -> None:
        where = self.layers, self.rows, self.places[:tokens]
        order = torch.arange(tokens, device=kept.device)[:, None]
        stays = (order < kept)[:, None].view(tokens, 1, -1, *[1] * (self.before.dim() - 3))
        self.now[where] = torch.where(stays, self.now[where], self.before[:tokens])


class Versions:
    """See above.

    Args:
        layers: mixer and state of each; the states' tensors become parts of tensors that all share.
        tokens: most of a round.
    """

    def __init__(self, layers: Iterable[tuple[Mixer, State]], tokens: int) -> None:
        alike: dict[Any, list[State]] = {}
        for mixer, state in layers:
            window = mixer.window
            ring = isinstance(window, RingWindow) and window.slots >= tokens
            tensors = tuple((name, x.shape, x.dtype) for name, x in sorted(state.tensors.items()))
            alike.setdefault((window.first if ring else None, tensors), []).append(state)
        self.parts: list[Same] = []
        for (first, tensors), states in alike.items():
            slots = KEYS if first is not None else ()
            whole = {
                name: Same([(state, name) for state in states], tokens)
                for name, *_ in tensors
                if name not in slots
            }
            self.parts += whole.values()
            for name in slots:
                self.parts.append(Slots([(state, name) for state in states], tokens, whole[NEXT], first))

    def save(self, token: int) -> None:
        """The round's token of this number, from 0, is about to be read."""
        for part in self.parts:
            part.save(token)

    def take(self, kept: Tensor, tokens: int) -> None:
        """Of the round's tokens, so many, those behind the first `kept` [B] of each row were never read."""
        for part in self.parts:
            part.take(kept, tokens)
