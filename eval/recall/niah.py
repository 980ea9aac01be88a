"""Needles in a haystack by RULER's definitions (Hsieh et al. 2024, arXiv 2404.06654, section 3 and appendix B).

single_1: words to numbers in repeated noise. single_2: the same in prose. single_3: words to UUIDs in prose.
multikey_1: four keys, one asked for. multikey_2: the whole haystack is needles. multikey_3: those with UUIDs to UUIDs.
multivalue: four values under one key. multiquery: four keys, all asked for.
Values are seven-digit numbers or UUIDs, the depths are drawn from forty even steps in whole per cents. Two differences:
the prose is a public domain book where RULER has essays, and words are of a list of our own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from linearize.eval.recall.item import BOOK, NOISE, Item, Needle, spread
from linearize.eval.recall.words import different, digits, uuid, word

NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize them. I will quiz you "
    "about the {kind}s afterwards.\n",
    "\nWhat are all the special magic {kind}s for {query} mentioned in the provided text? The special magic {kind}s "
    "for {query} mentioned in the provided text are",
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text? The special magic {kind} for "
    "{query} mentioned in the provided text is",
)


def number(random: Random) -> str:
    """Seven digits."""
    return digits(random, 7)


@dataclass(frozen=True)
class Niah:
    """A generator of RULER's family."""

    haystack: str
    key: Callable[[Random], str] = word
    value: Callable[[Random], str] = number
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def kind(self) -> str:
        """What the values are called."""
        return "number" if self.value is number else "uuid"

    def __call__(self, random: Random, depth: float | None = None) -> Item:
        """One item; a single needle lies at `depth`."""
        keys = different(self.key, random, self.keys)
        values = different(self.value, random, self.keys * self.values)
        held = {key: values[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}
        pairs = [(key, value) for key in keys for value in held[key]]
        random.shuffle(pairs)
        depths = spread(random, len(pairs))
        if depth is not None and len(pairs) == 1:
            depths = [depth]
        needles = tuple(
            Needle(self._needle(key, value), place) for (key, value), place in zip(pairs, depths, strict=True)
        )
        asked = random.sample(keys, self.queries)
        # in the order in which they stand in the text
        answers = tuple(value for key in asked for other, value in pairs if other == key)
        in_context = [value for value in values if value not in answers]
        fresh = different(self.value, random, 3 * len(answers), tuple(values))
        pool = in_context + fresh
        wrong = tuple(", ".join(pool[i * len(answers) : (i + 1) * len(answers)]) for i in range(3))
        single = len(answers) == 1
        before, after = ONE if single else MANY
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        place = (
            next(d for (key, _), d in zip(pairs, depths, strict=True) if key == asked[0]) if single else None
        )
        return Item(
            before=before.format(kind=self.kind),
            needles=needles,
            after=after.format(kind=self.kind, query=query),
            answers=answers,
            distractors=wrong,
            haystack=partial(self._another, keys) if self.haystack == "needles" else self.haystack,
            separator=" " if self.haystack == BOOK else "\n",
            depth=place,
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.kind, key=key, value=value)

    def _another(self, asked: list[str], random: Random) -> str:
        """A line of a haystack that is all needles; none of them answers the question."""
        [key] = different(self.key, random, 1, tuple(asked))
        return self._needle(key, self.value(random))


NIAH = {
    "niah_single_1": Niah(NOISE),
    "niah_single_2": Niah(BOOK),
    "niah_single_3": Niah(BOOK, value=uuid),
    "niah_multikey_1": Niah(BOOK, keys=4),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", key=uuid, value=uuid),
    "niah_multivalue": Niah(BOOK, values=4),
    "niah_multiquery": Niah(BOOK, keys=4, queries=4),
}
