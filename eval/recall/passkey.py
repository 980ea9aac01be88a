"""Passkey: a number in repeated sentences, at every depth and length (Mohtashami and Jaggi 2023, arXiv 2305.16300).

Five digits, a grid of depth by length, greedy exact match. LAWCAT (Liu et al. 2025, arXiv 2509.18467) reports passkey
retrieval by length; its exact text was not at hand, and the wording here is that of the first paper's kind.
"""

from __future__ import annotations

from random import Random

from linearize.eval.recall.item import NOISE, Item, Needle
from linearize.eval.recall.words import different, digits

BEFORE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
AFTER = "\nWhat is the pass key? The pass key is"
DIGITS = 5


def passkey(random: Random, depth: float | None = None) -> Item:
    """One passkey; the distractors are other numbers of as many digits."""
    depth = random.random() if depth is None else depth
    key, *others = different(lambda r: digits(r, DIGITS), random, 4)
    needle = Needle(NEEDLE.format(key=key), depth)
    return Item(BEFORE, (needle,), AFTER, (key,), tuple(others), NOISE, depth=depth)
