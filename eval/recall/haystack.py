"""Items to tokens: a haystack is filled around the needles until the prompt has exactly as many tokens as asked for.

All prompts of a length are then one rectangle: nothing is padded, and a length means what it says. The haystack is cut
at its beginning, in the middle of a sentence if need be, as an excerpt is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from linearize.config.schema import DataConfig
from linearize.data import validation_texts
from linearize.data.tokens import Tokens
from linearize.errors import DataError
from linearize.eval.recall.item import NOISE, Item

NOISE_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""What the passkey task and RULER repeat."""


@dataclass(frozen=True)
class Prompt:
    """Tokens of an item.

    Attributes:
        ids: of the prompt, begin token included; as long as was asked for.
        answers: ids of what may follow: the right answer, then the distractors.
        item: where they come from.
    """

    ids: list[int]
    answers: list[list[int]]
    item: Item


class Haystack:
    """Fills prompts for one tokenizer.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.encode = Tokens(tokenizer)
        self._pieces: dict[str, list[int]] = {}

    def assemble(self, item: Item, length: int, seed: Random) -> Prompt:
        """A prompt of exactly `length` tokens.

        Raises:
            DataError: the item alone is longer.
        """
        separator = item.separator
        after, *answers = self._seams(item.after, [item.answer, *item.distractors])
        before = self.encode.begin + self._ids(item.before)
        needles = [self._ids(separator + needle.text) for needle in item.needles]
        need = length - len(before) - len(after) - sum(map(len, needles))
        if need < 0:
            raise DataError(f"the item alone has {length - need} tokens and does not fit into {length}")
        filling: list[list[int]] = []
        have = 0
        for sentence in self._sentences(item, seed):
            if have >= need:
                break
            filling.append(self._ids(separator + sentence))
            have += len(filling[-1])
        surplus = have - need
        # of a list's line that is cut only the end is left, and behind a needle it would read as the end of its answer
        first = 1 if surplus and callable(item.haystack) else 0
        while surplus:  # an excerpt begins anywhere
            cut = min(surplus, len(filling[0]))
            filling[0] = filling[0][cut:]
            surplus -= cut
            if not filling[0]:
                filling.pop(0)
                first = 0
        ids = list(before)
        borders = _borders(filling)
        places = [max(first, _nearest(borders, needle.depth * need)) for needle in item.needles]
        for index in range(len(filling) + 1):
            for needle, place in zip(needles, places, strict=True):
                if place == index:
                    ids += needle
            ids += filling[index] if index < len(filling) else []
        return Prompt(ids + after, answers, item)

    def _ids(self, text: str) -> list[int]:
        if text not in self._pieces:
            if len(self._pieces) > 2**17:  # entries that are made up never come again
                self._pieces.clear()
            self._pieces[text] = self.encode([text])[0]
        return self._pieces[text]

    def _seams(self, text: str, continuations: list[str]) -> list[list[int]]:
        """Ids of a text, and of what follows it after a space, split where the text ends."""
        own = self._ids(text)
        found = [own]
        for continuation in continuations:
            whole = self.encode([f"{text} {continuation}"])[0]
            clean = whole[: len(own)] == own
            found.append(whole[len(own) :] if clean else self.encode([f" {continuation}"])[0])
        return found

    def _sentences(self, item: Item, seed: Random) -> Iterator[str]:
        """The haystack's sentences without end."""
        if callable(item.haystack):
            while True:
                yield item.haystack(seed)
        sentences = NOISE_SENTENCES if item.haystack == NOISE else book()
        start = 0 if item.haystack == NOISE else seed.randrange(len(sentences))
        while True:
            yield from sentences[start:]
            start = 0


@cache
def book() -> tuple[str, ...]:
    """Sentences of the package's held-out books, in order."""
    text = " ".join(validation_texts(DataConfig(validation="builtin")))
    found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    return tuple(sentence for sentence in found if len(sentence) > 1)


def _borders(pieces: list[list[int]]) -> list[int]:
    """Tokens before each piece, and behind the last."""
    borders = [0]
    for piece in pieces:
        borders.append(borders[-1] + len(piece))
    return borders


def _nearest(borders: list[int], tokens: float) -> int:
    return min(range(len(borders)), key=lambda index: abs(borders[index] - tokens))
