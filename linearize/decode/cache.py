"""A generation cache of fixed size: every tensor is written in place and every position is on the device.

What one CUDA graph needs that serves all tokens of a text. One clock counts the tokens for all layers; converted layers
hold their mixer's state, softmax layers hold keys and values of `length` tokens, whatever their teacher's window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from linearize.decode.bounded import bounded, hold_window
from linearize.memory import Room
from linearize.mixers import Mixer, State
from linearize.surgery.cache import LinearizedCacheLayer


class Clock:
    """Tokens that a cache holds: those of a prefix while the prompt is read, then a number on the device.

    Attributes:
        tokens: [] int64 on the device; whoever runs a step advances it.
        before: tokens of the prefix that the prompt goes on from.
        running: the prompt has been read, and tokens come one by one.
        expected: `tokens` as the host counts them.
        room: that buffers and states are taken from when they are made; None: nobody counts.
    """

    room: Room | None = None

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.running, self.before, self.expected = False, 0, 0

    @property
    def length(self) -> int | Tensor:
        """Tokens before those of the current call."""
        return self.tokens if self.running else self.before

    def start(self, tokens: int) -> None:
        """A prompt of so many tokens has been read."""
        self.tokens.fill_(tokens)
        self.running, self.expected = True, tokens


class FixedState(LinearizedCacheLayer):
    """A converted layer: its mixer's state, made with the first token and kept from text to text.

    Args:
        clock: shared by all layers.
        length: tokens in the buffers of softmax layers, whose masks are as wide.
    """

    is_compileable = True
    is_sliding = False
    copies_held = 1
    """Tensors of the state that there are of each."""

    def __init__(self, clock: Clock, length: int) -> None:
        CacheLayerMixin.__init__(self)
        self.clock, self.max_cache_len = clock, length
        self.state: State | None = None
        self.mixer: Mixer | None = None
        self._bounded: tuple[Mixer, Mixer] | None = None
        self.record_past, self.seen = False, 0
        self._drop_record()

    def attend(self, mixer: Mixer, *args: Any, **kwargs: Any) -> Tensor:
        if self._bounded is None or self._bounded[0] is not mixer:
            self._bounded = mixer, bounded(mixer, self.max_cache_len)
        if self.state is None and self.clock.room is not None:
            k: Tensor = args[1]
            self.clock.room.take(self.copies_held * self._bounded[1].state_bytes(k.shape[0], k.dtype))
        return super().attend(self._bounded[1], *args, **kwargs)

    def _count(self, tokens: int) -> None:
        """The clock counts."""

    def mask_offset(self, tokens: int) -> int | None:
        """Prompts are padded, what is made is not: rows that have ended go on with tokens that nobody reads."""
        return None if self.clock.running else self.clock.before

    def get_seq_length(self) -> int:
        return self.clock.length  # type: ignore[return-value]  # a tensor as in transformers' static layers

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_cache_len if self.clock.running else self.clock.before + query_length), 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        raise NotImplementedError("a cache of fixed size takes no tokens back")

    def hold(self, tensors: dict[str, Tensor], tokens: int) -> None:
        """Take over what a text of so many tokens has left, [1, ...] by name, for every row and in place."""
        assert self.state is not None and self._bounded is not None, "the state is made with the first token"
        batch, (mixer, ring) = self.state.batch, self._bounded
        self.forgotten = False
        if ring is not mixer:
            hold_window(
                ring, self.state, {name: x.to(self.clock.tokens.device) for name, x in tensors.items()}
            )
            return
        for name, held in self.state.tensors.items():
            held.copy_(tensors[name].expand(batch, *held.shape[1:]))

    def reset(self) -> None:
        self.read, self.plain = None, False
        if self.state is not None:
            self.state.zero()
            self.forgotten = True


class FixedKeys(CacheLayerMixin):
    """A kept softmax layer: keys and values [B, N, length, K] in place, all of them seen through a mask.

    Args:
        clock: shared by all layers.
        length: most tokens that a text may have.
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, clock: Clock, length: int) -> None:
        super().__init__()
        self.clock, self.max_cache_len = clock, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        both = {"keys": key_states, "values": value_states}
        if self.clock.room is not None:
            tokens = sum(x[:, :, 0].numel() * x.element_size() for x in both.values())
            self.clock.room.take(self.max_cache_len * tokens)
        for name, like in both.items():
            batch, heads, _, width = like.shape
            setattr(self, name, like.new_zeros(batch, heads, self.max_cache_len, width))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if not self.clock.running:
            before, tokens = self.clock.before, key_states.shape[-2]
            self.keys[:, :, before : before + tokens].copy_(key_states)
            self.values[:, :, before : before + tokens].copy_(value_states)
            if not before:
                return key_states, value_states
            return self.keys[:, :, : before + tokens], self.values[:, :, : before + tokens]
        place = self.clock.tokens[None]
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.clock.length  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_cache_len if self.clock.running else self.clock.before + query_length), 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def hold(self, tensors: dict[str, Tensor], tokens: int) -> None:
        """Take over the keys and values [1, N, S, K] of a text of so many tokens, S of them its last, for every row."""
        assert self.keys is not None and self.values is not None, "buffers are made with the first token"
        for name in ("keys", "values"):
            held = tensors[name]
            getattr(self, name)[:, :, tokens - held.shape[2] : tokens].copy_(held)

    def reset(self) -> None:
        # stale keys are masked, but a value that is no number would pass through a weight of zero
        if self.keys is not None and self.values is not None:
            self.keys.zero_()
            self.values.zero_()


def fixed_cache(layers: int, converted: set[int], length: int, device: torch.device) -> tuple[Cache, Clock]:
    """An empty cache of `layers` layers, of which those in `converted` run mixers, and the clock that drives it."""
    clock = Clock(device)
    kinds = (FixedState if index in converted else FixedKeys for index in range(layers))
    return Cache(layers=[kind(clock, length) for kind in kinds]), clock


def tensors(cache: Cache) -> dict[str, Tensor]:
    """Every tensor that the cache holds between tokens, by layer and name."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, FixedState):
            held = {} if layer.state is None else layer.state.tensors
        else:
            held = {name: x for name in ("keys", "values") if (x := getattr(layer, name)) is not None}
        found |= {f"{index}.{name}": tensor for name, tensor in held.items()}
    return found
