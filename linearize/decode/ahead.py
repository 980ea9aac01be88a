"""A model that reads tokens ahead of a text, in one launch or one by one, and then keeps the first of them or none."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linearize.decode.ahead_cache import AheadClock, AheadState, ahead_cache
from linearize.decode.compiling import Compiled
from linearize.decode.masks import Masks, token_masks
from linearize.decode.newest import attending, fits, newest_numbers
from linearize.decode.prefix import Prefix
from linearize.decode.reader import Reader
from linearize.decode.versions import Versions


class Ahead(Reader):
    """See above. A round is `begin`, `go` as often as is wanted, and `keep`; nothing in it waits for the device.

    Args:
        model, batch: as of `Reader`.
        length: most tokens, those ahead included, if any layer is softmax.
        singly: tokens of a round, where they are read one by one and states are kept behind each; 0: any number in one
            launch, and what is kept of them is read again by the layers.

    Attributes:
        last: [] int64, the largest position that a token of the text can have; tokens ahead of the text's end, which
            nobody reads, get no larger one, for which a model may have no row.
        read: tokens of the round so far.
        compiled: what forwards of a round go through, or None: the model as it is.
        newest: kept softmax layers read the keys that tokens see by a kernel, see `Decoder`.
    """

    clock: AheadClock

    def __init__(self, model: Any, batch: int, length: int, singly: int = 0) -> None:
        super().__init__(model, batch, length, partial(ahead_cache, batch=batch, copies=not singly))
        self.singly = singly
        self.newest = self.keeps_softmax and fits(model, self.config)
        self._versions: Versions | None = None
        self.compiled: Compiled | None = None
        self.read = 0
        self.last = torch.zeros((), dtype=torch.int64, device=self.device)
        self._copies: tuple[list[Tensor], list[Tensor]] | None = None

    def start(self, ids: Tensor, mask: Tensor | None, prefix: Prefix | None, tokens: int) -> Tensor | None:
        """Forget everything and read prompts; logits [B, V] of what follows, None where there was no token to read.

        Args:
            ids, mask, prefix: see `Reader.fill`; T may be 0 once states are there.
            tokens: that may follow.
        """
        self.forget()
        self.clock.ahead = self.read = 0
        if self.compiled is not None:
            self.compiled.refresh()
        before = 0 if prefix is None else prefix.tokens
        self.last.fill_(before + ids.shape[1] + tokens - 1)
        if ids.shape[1]:
            return self.fill(ids, mask, prefix)
        if prefix is not None:
            layer: Any
            for index, layer in enumerate(self.cache.layers):
                layer.hold(prefix.layer(index), before)
        self.seen.fill_(True)
        self.clock.start(before)
        self.positions.fill_(before)
        return None

    def begin(self) -> None:
        """A round begins: states are copied, and the copies go ahead."""
        self.clock.ahead = self.read = 0
        if self.singly:
            if self._versions is None:
                self._versions = Versions([layer.held() for layer in self._states()], self.singly)
            return
        for layer in self._states():
            layer.begin()
        if self._copies is None:
            pairs = [pair for layer in self._states() for pair in layer.copies()]
            self._copies = [copy for copy, _ in pairs], [state for _, state in pairs]
        if self._copies[0]:
            torch._foreach_copy_(*self._copies)

    def go(self, ids: Tensor, *, every: bool = False) -> Tensor:
        """The next tokens [B, T] of the round, in one forward or one by one.

        Returns:
            Logits [B, V] of what follows the last of them, with `every` [B, T, V] of what follows each.
        """
        forward = self._forward_ahead if self.compiled is None else self.compiled
        if not self.singly:
            logits = forward(ids, every=every)
            self.read += ids.shape[1]
            self.clock.ahead = self.read
            return logits
        found = []
        for token in ids.split(1, 1):
            if self._versions is not None:
                self._versions.save(self.read)
            found.append(forward(token, every=every))
            # on the device, so that each token is read in the same way, and `keep` takes back what is too much
            self.clock.tokens.add_(1)
            self.positions.add_(1)
            self.read += 1
        return torch.cat(found, 1) if every else found[-1]

    def _forward_ahead(self, ids: Tensor, *, every: bool) -> Tensor:
        tokens, clock = ids.shape[1], self.clock
        order = torch.arange(clock.ahead, clock.ahead + tokens, device=self.device)
        positions = torch.minimum(self.positions + order, self.last)
        masks: Masks = self._no_masks
        if self.newest:
            seen = self.positions + order + 1
            masks = newest_numbers(self.config, clock.places(tokens), seen)
        elif self.keeps_softmax:
            masks = token_masks(self.config, self.seen, clock.places(tokens), self.dtype)
        given = {self._cache_name: self.cache, "use_cache": True, "attention_mask": masks}
        given |= {} if every else self._optional
        logits = self.model(input_ids=ids, position_ids=positions, **given).logits
        return logits if every else logits[:, -1]

    def keep(self, kept: Tensor, same: int | None = None) -> None:
        """The round is over: of its tokens [B, T] those that are true become text, in each row the first ones.

        Args:
            kept: bool.
            same: how many, if the host knows, of all rows that are still read: then nothing is masked, and where all
                are kept the copies are the states.
        """
        tokens, read = kept.sum(1), self.read
        if self.singly:
            if self._versions is not None and same != read:
                self._versions.take(tokens, read)
        elif same == read and self._copies is not None:
            copies, states = self._copies
            if copies:
                torch._foreach_copy_(states, copies)
        elif same != 0:
            for layer in self._states():
                layer.keep(kept if same is None else None, same or kept.shape[1])
        gone = tokens - read if self.singly else tokens
        self.clock.tokens += gone
        self.positions += gone[:, None]
        self.clock.ahead = self.read = 0

    def _decoding(self) -> AbstractContextManager[Any]:
        """See `Decoder`."""
        stack = ExitStack()
        stack.enter_context(super()._decoding())
        if self.newest:
            stack.enter_context(attending(self.config))
        return stack

    def _states(self) -> list[AheadState]:
        return [layer for layer in self.cache.layers if isinstance(layer, AheadState)]
