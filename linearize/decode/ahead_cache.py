"""A cache of fixed size from which tokens can be taken back, in every row another number of them, on the device.

A round of tokens goes ahead of the text: converted layers run them on a copy of their state and note their inputs, and
softmax layers write keys behind those of the text. Then each row keeps so many of them. A state advances by those
alone, in one call over all of the round's tokens in which the rest is padding, which changes nothing in a mixer; keys
that are not kept lie behind the text's end, unseen, and the next round writes over them. So one shape serves every
outcome. Where a round's tokens come one by one, the state itself runs ahead, and `Versions` takes it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from linearize.decode.cache import Clock, FixedKeys, FixedState
from linearize.mixers import Mixer, State


class AheadClock(Clock):
    """Tokens of each row's text, and of the round ahead of it.

    Attributes:
        tokens: [B] int64 on the device, places of the rows' next tokens.
        ahead: tokens of the round so far.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        super().__init__(device)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.ahead = 0

    @property
    def length(self) -> int:
        """Models are given positions and masks, and only ask whether there are tokens before."""
        return 1 if self.running else self.before

    def places(self, tokens: int) -> Tensor:
        """Places [B, T] of the round's next tokens."""
        return self.tokens[:, None] + torch.arange(self.ahead, self.ahead + tokens, device=self.tokens.device)


class AheadState(FixedState):
    """A converted layer: its mixer's state behind the text, and that behind the tokens ahead of it.

    Args:
        clock, length: see `FixedState`.
        copied: tokens ahead run on a copy of the state.
    """

    clock: AheadClock

    def __init__(self, clock: AheadClock, length: int, *, copied: bool) -> None:
        super().__init__(clock, length)
        self.copied, self.copies_held = copied, 1 + copied
        self.trial: State | None = None
        self._calls: list[dict[str, Tensor]] = []

    def entered(self, valid: Tensor | None) -> tuple[State | None, Tensor | None]:
        return (self.trial if self.clock.running and self.copied else self.state), valid

    def attend(
        self,
        mixer: Mixer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        valid: Tensor | None,
        starts: Tensor | None,
        gaps: bool | None = None,
        **context: Any,
    ) -> Tensor:
        if not self.clock.running:
            return super().attend(mixer, q, k, v, valid=valid, starts=starts, gaps=gaps, **context)
        assert self._bounded is not None and self._bounded[0] is mixer and self.state is not None
        if not self.copied:
            return self._bounded[1].step(q, k, v, state=self.state, **context)
        assert self.trial is not None
        call = {"q": q, "k": k, "v": v}
        call |= {name: context[name] for name in ("hidden", "first") if name in context}
        if "plain" in context:
            call["plain_q"], call["plain_k"] = context["plain"]
        self._calls.append(call)
        mixer = self._bounded[1]
        if k.shape[1] == 1:
            return mixer.step(q, k, v, state=self.trial, **context)
        return mixer.chunked(q, k, v, state=self.trial, gaps=False, **context)

    def held(self) -> tuple[Mixer, State]:
        """What runs, and its state."""
        assert self.state is not None and self._bounded is not None, "the state is made with the first token"
        return self._bounded[1], self.state

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """(copy, what it is a copy of) of each tensor of the state."""
        assert self.state is not None, "the state is made with the first token"
        if self.trial is None:
            self.trial = self.state.clone()
        return [(self.trial[name], self.state[name]) for name in self.state]

    def begin(self) -> None:
        """Nothing is ahead of the text; also where a round before was left in the middle."""
        self._calls.clear()

    def keep(self, kept: Tensor | None, tokens: int) -> None:
        """Advance the state by the round's first tokens.

        Args:
            kept: [B, T] bool, true where, in each row the first ones; None: all of them.
            tokens: T, at most those of the round.
        """
        assert self.state is not None and self._bounded is not None
        past: dict[str, Any] = {
            name: torch.cat([call[name] for call in self._calls], 1)[:, :tokens] for name in self._calls[0]
        }
        if "plain_q" in past:
            past["plain"] = (past.pop("plain_q"), past.pop("plain_k"))
        self._bounded[1].chunked(**past, valid=kept, state=self.state, gaps=kept is not None)
        self._calls.clear()


class AheadKeys(FixedKeys):
    """A kept softmax layer: keys and values [B, N, length, K], those of the round behind each row's own text."""

    clock: AheadClock

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.clock.running:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None
        places = self.clock.places(key_states.shape[2])
        rows = torch.arange(len(places), device=places.device)[:, None]
        self.keys[rows, :, places] = key_states.transpose(1, 2)
        self.values[rows, :, places] = value_states.transpose(1, 2)
        return self.keys, self.values


def ahead_cache(
    layers: int, converted: set[int], length: int, device: torch.device, *, batch: int, copies: bool = True
) -> tuple[Cache, AheadClock]:
    """As `fixed_cache`, for so many rows; `copies`: see `AheadState`."""
    clock = AheadClock(batch, device)
    held = (
        AheadState(clock, length, copied=copies) if index in converted else AheadKeys(clock, length)
        for index in range(layers)
    )
    return Cache(layers=[*held]), clock
