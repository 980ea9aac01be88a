"""What a round wrote, as documents, and which of them are no text to learn from: short, looping, or known already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from linearize.sample.writer import ENDED, START, TOKEN

FEWEST = 16
"""Tokens that a model must have added to an opening."""
GRAM = 4
"""Tokens that are looked at together where loops are sought."""
STRETCH = 64
"""Places of such groups; one stretch that mostly repeats is a loop, wherever in the document it is."""
REPEATED = 0.7
"""Share of a stretch whose groups stood in the document before, from which on it loops. Text has 0.1, tables 0.5."""
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
    """

    ids: np.ndarray
    opening: int
    given: int
    ended: bool


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
            yield Written(row[start:stop] & TOKEN, opening, int(sizes[opening]), ended)


class Filter:
    """What is kept, in the order in which documents come.

    Args:
        known: beginnings of documents that were kept before.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known

    def verdict(self, document: Written) -> str | None:
        """Why a document is dropped: short, loop, duplicate; None where it is kept, and known from then on."""
        if len(document.ids) - document.given < FEWEST:
            return "short"
        if loops(document.ids):
            return "loop"
        mark = beginning(document.ids)
        if mark in self._known:
            return "duplicate"
        self._known.add(mark)
        return None


def loops(ids: np.ndarray) -> bool:
    """Whether some stretch of a document says again what stood in it before."""
    if len(ids) < 2 * GRAM:
        return False
    grams = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), GRAM)
    # a polynomial modulo 2^64: two different groups in one document meet once in 10^13 documents
    marks = np.zeros(len(grams), np.uint64)
    for column in grams.T:
        marks = marks * np.uint64(6364136223846793005) + column + np.uint64(1)
    order = np.argsort(marks, kind="stable")
    again = np.zeros(len(marks), np.int64)
    again[order[1:]] = marks[order[1:]] == marks[order[:-1]]
    width = min(STRETCH, len(again))
    sums = np.concatenate([[0], again.cumsum()])
    return bool((sums[width:] - sums[:-width]).max() > REPEATED * width)


def beginning(ids: np.ndarray) -> int:
    """A number for the first tokens of a document, of 63 bits."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids[:BEGINNING], dtype=np.int32).tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1
