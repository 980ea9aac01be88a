"""Variable tracking by RULER's definition (Hsieh et al. 2024, arXiv 2404.06654): one chain of five names, four hops.

``VAR A = 12345``, ``VAR B = VAR A``, ...: all names that hold the number are asked for. As in RULER, a short worked
example of other names comes first.
"""

from __future__ import annotations

import string
from itertools import pairwise
from random import Random

from linearize.eval.recall.item import NOISE, Item, Needle, spread
from linearize.eval.recall.words import different, digits

HOPS = 4
BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
AFTER = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)


def variable_tracking(random: Random, depth: float | None = None) -> Item:
    """One chain, its links at drawn depths in their order; the wrong lists are made of other names."""
    names = different(lambda r: _name(r, 5), random, 4 * (HOPS + 1))
    chain, others = names[: HOPS + 1], names[HOPS + 1 :]
    value = digits(random, 5)
    needles = [
        Needle(f"{link}.", place)
        for link, place in zip(_links(chain, value), spread(random, HOPS + 1), strict=True)
    ]
    example, number = different(lambda r: _name(r, 3), random, HOPS + 1), digits(random, 5)
    shown = (
        f"{BEFORE}{' '.join(f'{link}.' for link in _links(example, number))}"
        f"{AFTER.format(value=number, count=HOPS + 1)} {', '.join(example)}\n\n\n"
    )
    return Item(
        before=shown + BEFORE,
        needles=tuple(needles),
        after=AFTER.format(value=value, count=HOPS + 1),
        answers=tuple(chain),
        distractors=tuple(", ".join(others[i : i + HOPS + 1]) for i in range(0, len(others), HOPS + 1)),
        haystack=NOISE,
        separator="\n",
    )


def _name(random: Random, letters: int) -> str:
    return "".join(random.choices(string.ascii_uppercase, k=letters))


def _links(chain: list[str], value: str) -> list[str]:
    return [f"VAR {chain[0]} = {value}"] + [f"VAR {name} = VAR {before}" for before, name in pairwise(chain)]
