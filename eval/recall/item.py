"""One question about a long text: needles, the text around them, and what the answer is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

NOISE = "noise"
BOOK = "book"


@dataclass(frozen=True)
class Needle:
    """A sentence that is put into the haystack."""

    text: str
    depth: float
    """Share of the haystack's tokens that come before it, 0 to 1."""


@dataclass(frozen=True)
class Item:
    """What a generator makes; `haystack.assemble` turns it into tokens of any length."""

    before: str
    """What stands ahead of the haystack: the instruction, and worked examples."""
    needles: tuple[Needle, ...]
    """In the order of their depths."""
    after: str
    """The question and the beginning of its answer, without a space at the end."""
    answers: tuple[str, ...]
    """What the continuation must hold; a single one must be how it begins."""
    distractors: tuple[str, ...]
    """Wrong answers of the same form, for the likelihood; where there are several answers, whole wrong lists."""
    haystack: str | Callable[[Random], str] = BOOK
    """What lies around the needles: noise, book, or a function that makes one line of it."""
    separator: str = " "
    """Between the pieces of the haystack."""
    depth: float | None = None
    """Of the needle that is asked for, where there is one."""

    @property
    def answer(self) -> str:
        """The answer as it is scored by likelihood."""
        return ", ".join(self.answers)


class Generator(Protocol):
    """Makes the items of a task, the same ones for the same random numbers."""

    def __call__(self, random: Random, depth: float | None = None) -> Item:
        """One item; a task with one needle puts it at `depth`, others draw their own."""


DEPTHS = [round(100 * step / 39) / 100 for step in range(40)]
"""RULER's: forty even steps from the beginning to the end, in whole per cents."""


def spread(random: Random, count: int, depths: Sequence[float] = DEPTHS) -> list[float]:
    """Depths of so many needles out of those given, all different, in order."""
    return sorted(random.sample(depths, count))
