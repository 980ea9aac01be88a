"""Pairs of answers out of plain text, so that a preference stage runs without data of its own.

A sentence asks, the one that follows it is the chosen answer, one from elsewhere in the document the rejected one. That
tells whether a stage works; what makes an answer good, only pairs that people or models have judged can teach.
"""

from __future__ import annotations

import re

from linearize.data.document import Document

SHORTEST, LONGEST = 20, 160
"""Characters of a sentence that is taken."""
_END = re.compile(r"(?<=[.!?])\s+")


def pair(text: str) -> Document | None:
    """Three parts, as the template preference makes them: prompt, chosen, rejected; None where the text has too few."""
    sentences = [" ".join(sentence.split()) for sentence in _END.split(text)]
    fit = [SHORTEST <= len(sentence) <= LONGEST for sentence in sentences]
    first = next((place for place in range(len(fit) - 1) if fit[place] and fit[place + 1]), None)
    if first is None:
        return None
    far = [
        place
        for place in range(first + 2, len(fit))
        if fit[place] and sentences[place] != sentences[first + 1]
    ]
    if not far:
        return None
    prompt, chosen, rejected = sentences[first], sentences[first + 1], sentences[far[len(far) // 2]]
    return Document(((prompt, False), (f" {chosen}", True), (f" {rejected}", True)))
