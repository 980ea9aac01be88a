"""Recorded pieces of prompts without a card: a graph calls again what was recorded, and memory is a number."""

from __future__ import annotations

from typing import Any

import torch

from linearize.decode import pieces


class Graph:
    """Stands for a CUDA graph: what was called, again, into the same memory."""

    def __init__(self, call: Any, made: torch.Tensor) -> None:
        self.call, self.made, self.replays = call, made, 0

    def replay(self) -> None:
        self.replays += 1
        self.made.copy_(self.call())


class Card:
    """Stands for a GPU's memory: recordings without a graph beside them take `piece`, others `more`.

    Attributes:
        free: bytes.
        taken: by torch.
    """

    def __init__(self, free: int = 2**40, piece: int = 100, more: int = 0) -> None:
        self.free, self.piece, self.more, self.taken = free, piece, more, 0

    def take(self, beside: object) -> None:
        size = self.more if beside else self.piece
        self.free, self.taken = self.free - size, self.taken + size

    def memory(self, device: torch.device) -> tuple[int, int]:
        return self.taken, self.free


def on_cpu(monkeypatch: Any, card: Card, words: int) -> list[Graph]:
    """From here on pieces of models of so many words can be recorded; gives the graphs that are made."""
    found: list[Graph] = []

    def record(call: Any, beside: Any = None) -> tuple[Graph, torch.Tensor]:
        asked = next(
            x.cell_contents for x in call.__closure__ if isinstance(x.cell_contents, pieces.Recorded)
        )
        # a recording computes nothing
        made = torch.full((len(asked._ids), words), torch.nan)
        assert beside is None or beside in found
        card.take(beside)
        found.append(Graph(call, made))
        return found[-1], made

    monkeypatch.setattr(pieces, "memory", card.memory)
    monkeypatch.setattr(pieces, "record", record)
    return found
