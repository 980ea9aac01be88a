"""Phone book look-up (Jelassi et al. 2024, "Repeat After Me", arXiv 2402.01032, section 4): a whole context of entries.

Every line is a name and a number, and one name is asked for after two look-ups that show how. Names do not repeat in
what is asked; the book fills the context, so a longer context holds more entries.
"""

from __future__ import annotations

from random import Random

from linearize.eval.recall.item import Item, Needle
from linearize.eval.recall.words import FIRST, LAST, different, digits


def phonebook(random: Random, depth: float | None = None) -> Item:
    """One look-up; the distractors are other numbers that stand in the book."""
    depth = random.random() if depth is None else depth
    names = different(_name, random, 6)
    numbers = different(_number, random, 6)
    lines = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
    places = sorted([(depth, lines[0]), *((random.random(), line) for line in lines[1:])])
    shown = "".join(f"\n\nWhat is the number of {names[i]}?\n{lines[i]}" for i in (1, 2))

    def entry(random: Random) -> str:
        name = _name(random)
        return f"{name} Jr.: {_number(random)}" if name in names else f"{name}: {_number(random)}"

    return Item(
        before="A phone book:\n",
        needles=tuple(Needle(line, place) for place, line in places),
        after=f"{shown}\n\nWhat is the number of {names[0]}?\n{names[0]}:",
        answers=(numbers[0],),
        distractors=tuple(numbers[3:]),
        haystack=entry,
        separator="\n",
        depth=depth,
    )


def _name(random: Random) -> str:
    return f"{random.choice(FIRST)} {random.choice(LAST)}"


def _number(random: Random) -> str:
    return f"{digits(random, 3)}-{digits(random, 4)}"
