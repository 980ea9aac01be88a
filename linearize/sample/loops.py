"""Loops in a document: found in a whole one by the host, and in the rows that are being written by the device.

A model that has begun to loop does not stop: most of what it writes up to a document's longest length would be dropped.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GRAM = 4
"""Tokens that are looked at together where loops are sought."""
STRETCH = 64
"""Places of such groups; one stretch that mostly repeats is a loop, wherever in the document it is."""
REPEATED = 0.7
"""Share of a stretch whose groups stood in the document before, from which on it loops. Text has 0.1, tables 0.5."""
MOST = int(REPEATED * STRETCH)
"""Repeated groups in a stretch of text."""


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


class Watch:
    """Rows in which a document is written token by token; tells which of them have begun to loop.

    What it finds is what `loops` finds of the document as far as it is written. Nothing is read back by the host, all
    buffers are written in place, and a step costs a pass over [B, L] tokens: it may stand in a captured graph.

    Args:
        batch: rows.
        length: L, tokens that a document has at most.
        device: of the rows.
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self.text = torch.zeros(batch, max(length, GRAM), dtype=torch.int32, device=device)
        self.again = torch.zeros(batch, STRETCH, dtype=torch.bool, device=device)
        self.looping = torch.zeros(batch, dtype=torch.bool, device=device)
        self._back = torch.arange(1 - GRAM, 1, device=device)
        self._ends = torch.arange(GRAM - 1, self.text.shape[1], device=device)

    def begin(self, tokens: Tensor) -> None:
        """Every row begins a document with a token [B]."""
        self.again.zero_()
        self.looping.zero_()
        self.text[:, 0] = tokens

    def take(self, tokens: Tensor, places: Tensor) -> None:
        """Every row has a token [B] more, at its place [B] in the row's document; 0 begins another one."""
        self.text.scatter_(1, places[:, None], tokens.int()[:, None])
        newest = self.text.gather(1, (places[:, None] + self._back).clamp_min(0))
        same = self._ends < places[:, None]
        for number in range(GRAM):
            column = self.text[:, number : number + len(self._ends)]
            same = same & (column == newest[:, number : number + 1])
        again = same.any(1) & (places >= GRAM - 1)
        self.again.logical_and_((places > 0)[:, None])
        self.again.scatter_(1, places[:, None] % STRETCH, again[:, None])
        self.looping.copy_(self.again.sum(1) > MOST)
