"""Prompts that are read together, a piece of each in one call, beside the texts that decode.

A recurrence runs along a text, and rows side by side, so a card is better filled by eight pieces of 1,000 tokens than
by one of 8,000. Pieces of unequal length are padded in front. Mixers leave padding out; softmax layers put its keys
behind the row's text, where nothing looks before a token of the text lies there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linearize.decode.pieces import Pieces
from linearize.decode.row_cache import Row, RowCache
from linearize.decode.row_model import WIDTH, RowModel


class Prompts:
    """Those being read are rows 0, 1, ... of a cache of their own; the last fills the place of one that leaves.

    Args:
        model: that reads.
        like: what a row holds.
        most: prompts at once.
        records: record pieces of one shape as CUDA graphs, where no layer's work grows with the text.
    """

    def __init__(self, model: RowModel, like: Row, most: int, *, records: bool = False) -> None:
        self._model, self._held = model, RowCache(like, most, model.held)
        self._pieces = Pieces(records and not model.held)
        self._read: list[int] = []
        self._touched = [0] * most

    @property
    def records(self) -> bool:
        """Whether pieces of one shape are recorded."""
        return self._pieces.records

    @property
    def read_of(self) -> list[int]:
        """Tokens that have been read of each."""
        return self._read

    def begin(self) -> int:
        """One more; what its row held is forgotten. Returns its number, the last."""
        row = len(self._read)
        self._forget(row)
        self._read.append(0)
        return row

    def skip(self, tokens: int) -> None:
        """As if so many tokens of each had been read."""
        self._read = [tokens] * len(self._read)

    def read(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """The next piece of each, at least one token; logits [P, V] of what follows."""
        tokens = [len(piece) for piece in pieces]
        columns = max(tokens)
        # padding is a token of the row's own, so that a row's numbers depend on no other's
        ids = [[piece[-1]] * (columns - len(piece)) + list(piece) for piece in pieces]
        places, valid = self._places(tokens, columns)
        before, behind = max(self._read), max(self._read) + columns
        width = min(-(-behind // WIDTH) * WIDTH, self._model.held)
        self._touched[: len(pieces)] = (max(each, behind) for each in self._touched[: len(pieces)])
        given = torch.tensor(ids, device=self._model.device)

        def read(ids: Tensor, places: Tensor) -> Tensor:
            return self._call(ids, places, before, width, valid)

        whole = valid is None
        logits = self._pieces(read, given, places, behind=before > 0) if whole else read(given, places)
        self._read = [read + new for read, new in zip(self._read, tokens, strict=True)]
        return logits

    def _call(self, ids: Tensor, places: Tensor, before: int, width: int, valid: Tensor | None) -> Tensor:
        """Read ids [P, T] into the first P rows, whose memory stays where it is; logits [P, V]."""
        cache = self._held.first(width, places, before, valid)
        logits = self._model(ids, places, cache, width)
        for name, moved in self._held.moved(cache).items():
            self._held.held[name][: len(ids)].copy_(moved)
        return logits

    def give(self, prompt: int, target: RowCache, row: int) -> None:
        """Copy what was read of one into a row of the texts that decode."""
        target.fill(row, self._held, prompt, self._read[prompt])

    def leave(self, prompt: int) -> None:
        """One is not read any more; the last takes its number."""
        last = len(self._read) - 1
        if prompt != last:
            self._forget(prompt)
            self._held.move(last, prompt, self._read[last])
            self._touched[prompt] = self._read[prompt] = self._read[last]
        self._read.pop()

    def clear(self) -> None:
        """Forget all."""
        self._read.clear()

    def _forget(self, row: int) -> None:
        self._held.zero(row, self._touched[row])
        self._touched[row] = 0

    def _places(self, tokens: list[int], columns: int) -> tuple[Tensor, Tensor | None]:
        """Places [P, T] of the columns, those of padding behind the row's text, and which are text."""
        device = self._model.device
        first = torch.tensor(self._read, device=device)[:, None]
        column = torch.arange(columns, device=device)
        if min(tokens) == columns:
            return first + column, None
        own = torch.tensor(tokens, device=device)[:, None]
        front = columns - own
        valid = column >= front
        behind = first + torch.where(valid, column - front, own + column)
        return (behind.clamp_max(self._model.held - 1) if self._model.held else behind), valid


def widest(left: Sequence[int], budget: int) -> int:
    """Tokens of each prompt in one call: as many as fit, while at most a third of what is computed is padding.

    Args:
        left: tokens that are left of each.
        budget: tokens that the call may compute, each prompt at least one.
    """
    most, rows = max(1, budget // len(left)), len(left)
    widths = sorted({min(own, most) for own in left}, reverse=True)
    return next(width for width in widths if 2 * rows * width <= 3 * sum(min(own, width) for own in left))
