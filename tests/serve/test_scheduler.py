"""Whose turn it is, on slots that write down what they are asked: nobody starves, and nobody waits for padding."""

from __future__ import annotations

import threading
import time

import pytest
import torch

pytest.importorskip("prometheus_client")

from linearize.decode.row_choice import Wish
from linearize.decode.slots import Made
from linearize.serve.metrics import Metrics
from linearize.serve.scheduler import Piece, Scheduler, Ticket


class Slots:
    """Makes zeros; `calls` are the widths of what was read, and 0 for each step of those that live."""

    def __init__(self, rows: int, prompts: int) -> None:
        self.rows, self.prompts, self.live = rows, prompts, 0
        self.calls: list[list[int]] = []
        self.reading = 0

    def begin(self) -> int:
        self.reading += 1
        assert self.reading <= self.prompts and self.live + self.reading <= self.rows
        return self.reading - 1

    def read(self, pieces) -> torch.Tensor:
        assert len(pieces) == self.reading and all(pieces)
        self.calls.append([len(piece) for piece in pieces])
        return torch.zeros(len(pieces), 4)

    def admit(self, done, logits, wishes) -> Made:
        assert len(done) == len(logits) == len(wishes) and sorted(done) == list(done)
        self.reading -= len(done)
        self.live += len(done)
        return Made(torch.zeros(len(done), 1, dtype=torch.int64), None)

    def forget(self, prompt: int) -> None:
        assert prompt < self.reading
        self.reading -= 1

    def run(self, steps: int) -> Made:
        self.calls.append([])
        return Made(torch.zeros(self.live, steps, dtype=torch.int64), None)

    def drop(self, row: int, *, broken: bool = False) -> None:
        assert row < self.live
        self.live -= 1


def served(slots: Slots, lengths: list[int], tokens: int, piece: int, wide: int) -> list[Ticket]:
    """Texts of these lengths, asked for at once; returns them in the order in which they ended."""
    ended: list[Ticket] = []
    done = threading.Event()
    scheduler = Scheduler(
        slots, eos=(), queue=len(lengths), piece=piece, wide=wide, every=1,
        metrics=Metrics(slots.rows, 1), post=lambda call: call(),
    )  # fmt: skip

    def ticket(length: int) -> Ticket:
        def put(each: Piece) -> None:
            if each.end is not None:
                ended.append(made)
                done.set() if len(ended) == len(lengths) else None

        made = Ticket([1] * length, tokens, Wish(), put, time.monotonic() + 60)
        return made

    scheduler.start()
    scheduler.submit([ticket(length) for length in lengths])
    assert done.wait(60), scheduler.failure
    scheduler.close(0)
    scheduler.join(10)
    assert not scheduler.alive and slots.live == slots.reading == 0
    return ended


@pytest.mark.parametrize("wide", [4, 32], ids=["rows", "whole"])
def test_those_that_decode_wait_for_a_piece_at_most(wide):
    slots = Slots(rows=6, prompts=4)
    served(slots, [3, *([100, 7, 61] * 6)], tokens=12, piece=32, wide=wide)
    between = 0
    for call in slots.calls:
        between = between + max(call) * len(call) if call else 0
        assert between <= 32
    assert sum(map(sum, slots.calls)) == 3 + 6 * 168, "every token is read once"


def test_long_prompts_share_a_piece_where_they_fill_rows():
    slots = Slots(rows=8, prompts=4)
    served(slots, [64] * 4, tokens=2, piece=32, wide=8)
    assert [call for call in slots.calls if call] == [[8] * 4] * 8


def test_a_long_prompt_has_the_piece_where_rows_gain_nothing():
    slots = Slots(rows=8, prompts=4)
    served(slots, [64, 64, 5], tokens=2, piece=32, wide=32)
    assert [call for call in slots.calls if call][:2] == [[32], [32]]


def test_short_prompts_end_before_a_long_one():
    slots = Slots(rows=8, prompts=4)
    ended = served(slots, [4000, 4, 4, 4], tokens=2, piece=32, wide=8)
    assert [len(ticket.prompt) for ticket in ended] == [4, 4, 4, 4000]
    assert slots.calls[0] == [4, 4, 4, 4]
