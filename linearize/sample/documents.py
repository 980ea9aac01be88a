"""What a round wrote, as documents, and which of them are no text to learn from: short, looping, or known already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from linearize.sample.loops import STRETCH, loops
from linearize.sample.writer import ENDED, START, TOKEN

FEWEST = 16
"""Tokens that a model must have added to an opening."""
BEGINNING = 64
"""Tokens of which two documents must not have the same."""


@dataclass(frozen=True)
class Written:
    """A document of a round.

    Attributes:
        ids: its tokens, opening included.
        opening: number of its opening.
        given: tokens of the opening.
        ended: the model ended it; else it was cut, by its length or by the end of the round.
        last: of its row, cut by the end of the round.
    """

    ids: np.ndarray
    opening: int
    given: int
    ended: bool
    last: bool = False


def documents(written: np.ndarray, order: np.ndarray, sizes: np.ndarray) -> Iterator[Written]:
    """The documents of a round, row by row.

    Args:
        written: [B, T] of `Writer.write`.
        order: [B, Q] openings of each row.
        sizes: [N] tokens of each opening.
    """
    for row, openings in zip(written, order, strict=True):
        starts = np.flatnonzero(row & START)
        stops = [*starts[1:], len(row)]
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            opening = int(openings[number % len(openings)])
            ended = bool(stop < len(row) and row[stop] & ENDED)
            yield Written(row[start:stop] & TOKEN, opening, int(sizes[opening]), ended, stop == len(row))


class Filter:
    """What is kept, in the order in which documents come.

    Args:
        known: beginnings of documents that were kept before.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known

    def verdict(self, document: Written) -> str | None:
        """Why a document is dropped: short, loop, duplicate; None where it is kept, and known from then on."""
        # of a few tokens that the end of a round has cut nobody can say whether they had begun to loop
        if len(document.ids) - document.given < (STRETCH if document.last else FEWEST):
            return "short"
        if loops(document.ids):
            return "loop"
        mark = beginning(document.ids)
        if mark in self._known:
            return "duplicate"
        self._known.add(mark)
        return None


def beginning(ids: np.ndarray) -> int:
    """A number for the first tokens of a document, of 63 bits."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids[:BEGINNING], dtype=np.int32).tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1
