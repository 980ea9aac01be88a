"""Tokens to text as they come: whole characters only, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

CONTEXT = 6
"""Tokens before a text that its first ones are decoded behind: tokenizers write a word's space by what precedes it."""
BROKEN = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""
KEPT = 64
"""Tokens beyond which those that will not be looked at again are forgotten, and bytes are no character any more."""


class Text:
    """The text of tokens that come one by one.

    A piece is handed out once it ends in whole characters and cannot be the beginning of a stop string.

    Args:
        tokenizer: of transformers.
        stops: strings that end the text and are no part of it.
        before: tokens that precede the text, or none where it stands for itself.
        whole: nobody looks before the end, so that without stop strings everything is decoded at once then.

    Attributes:
        stopped: a stop string has been found.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = (), *, whole: bool = False
    ) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._controls = controls(tokenizer)
        self._ids = self._written(before)[-CONTEXT:]
        self._from, self._to = 0, len(self._ids)
        text = self._decode()
        self._shown = len(text)
        # a prompt of ids may end within a character, which the text's first tokens then complete
        self._half = self._shown - len(text.rstrip(BROKEN))
        self._held = ""
        self._lazy = whole and not stops
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The new text that more tokens bring."""
        if self.stopped or not ids:
            return ""
        self._ids += self._written(ids)
        return "" if self._lazy else self._cut(self._fresh(last=False), last=False)

    def read(self, ids: Sequence[int]) -> tuple[str, int]:
        """The new text that more tokens bring, and how many of them were read: none behind a stop string."""
        if not self._stops:
            return self.push(ids), len(ids)
        new = ""
        for count, token in enumerate(ids, start=1):
            new += self.push([token])
            if self.stopped:
                return new, count
        return new, len(ids)

    def end(self) -> str:
        """What is left when no more tokens come."""
        return "" if self.stopped else self._cut(self._fresh(last=True), last=True)

    def _fresh(self, *, last: bool) -> str:
        """Decoded text that has not been seen, without bytes at its end that may be part of a character."""
        text = self._decode()
        if self._half and text[self._shown - self._half : self._shown] != BROKEN * self._half:
            self._shown, self._half = self._shown - self._half, 0
        waits = not last and len(self._ids) - self._to <= KEPT
        final = text.rstrip(BROKEN) if waits else text
        fresh, self._shown = final[self._shown :], max(self._shown, len(final))
        if fresh and final == text:
            # from here on decode behind the last piece alone
            self._from, self._to, self._half = self._to, len(self._ids), 0
            if self._from > KEPT:
                del self._ids[: self._from]
                self._from, self._to = 0, len(self._ids)
            self._shown = len(self._decode())
        return fresh

    def _written(self, ids: Sequence[int]) -> list[int]:
        """Those that text comes of: control tokens would be looked at again and again until some does."""
        return [token for token in ids if token not in self._controls]

    def _decode(self) -> str:
        # the clean-up takes spaces out by what follows them, so that no text would be final
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(self._ids[self._from :], **options))

    def _cut(self, fresh: str, *, last: bool) -> str:
        """Hand out up to the first stop string, and hold back what may become one."""
        text = self._held + fresh
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


@lru_cache(maxsize=8)
def controls(tokenizer: Any) -> dict[int, str]:
    """Tokens that decoding leaves out, and how each is spelled."""
    added = {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
    return {
        index: text
        for index, text in added.items()
        if not tokenizer.decode([index], skip_special_tokens=True)
    }


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
