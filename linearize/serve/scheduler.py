"""Whose turn it is: one thread reads prompts piece by piece, several at once, decodes all slots, hands out tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from linearize.decode.prompts import widest
from linearize.decode.row_choice import NO_NUMBER, Wish
from linearize.decode.slots import Made, Slots
from linearize.serve.metrics import Metrics
from linearize.serve.refusal import Refusal

log = logging.getLogger(__name__)

LEAST = -9999.0
"""What OpenAI writes for a logarithm of no probability at all, which JSON has no number for."""
CLOSING = "the server is shutting down; ask another, or this one again later"


@dataclass(frozen=True)
class Score:
    """Of one token: its own logarithm of probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What is new of a text.

    Attributes:
        ids: tokens, the one that ended it left out.
        count: of them, that one included.
        scores: one for each of `ids`, if they were wanted.
        end: None while the text goes on, else "stop" or "length".
        refusal: why it ended otherwise, or None.
    """

    ids: list[int]
    count: int = 0
    scores: list[Score] = field(default_factory=list)
    end: str | None = None
    refusal: Refusal | None = None


@dataclass(eq=False)
class Ticket:
    """A text to be made.

    Attributes:
        prompt: ids, at least one.
        most: new tokens.
        wish: how they are chosen.
        put: gets every `Piece`, on the thread that `Scheduler.post` runs things on.
        deadline: of `time.monotonic`.
        endless: go on behind tokens that end texts.
        ends: tokens that end this text, be it endless or not.
        cancelled: why nobody waits for it any more ("stop", "cancelled"), or None.
    """

    prompt: list[int]
    most: int
    wish: Wish
    put: Callable[[Piece], None]
    deadline: float
    endless: bool = False
    ends: Collection[int] = ()
    cancelled: str | None = None
    made: int = 0
    read: int = 0
    born: float = field(default_factory=time.monotonic)


Outbox = list[tuple[Ticket, Piece]]


class Scheduler:
    """Texts that wait, those that are being read, and those in slots.

    Args:
        slots: prepared.
        eos: tokens that end a text.
        queue: texts that may wait beyond those that fit into slots.
        piece: tokens of prompts that are read between two looks at the slots, padding included.
        wide: tokens of a prompt that are worth a row in a call; another begins where its own still fit into `piece`.
        every: tokens between two looks of the host at what was made.
        metrics: to count in.
        post: runs a function of no arguments where tickets' `put` may be called.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        eos: Collection[int],
        queue: int,
        piece: int,
        wide: int,
        every: int,
        metrics: Metrics,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self.slots, self.eos, self.queue = slots, frozenset(eos), queue
        self.piece, self.wide, self.every = piece, wide, every
        self.metrics, self._post = metrics, post
        self.failure: str | None = None
        self._unusable = False
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._reading: list[Ticket] = []
        self._running: list[Ticket] = []
        self._outbox: Outbox = []
        self._closing: float | None = None
        self._thread = threading.Thread(target=self._work, name="linearize-serve", daemon=True)

    def start(self) -> None:
        """Begin to work, on a thread of its own."""
        self._thread.start()

    def submit(self, tickets: list[Ticket]) -> None:
        """Take texts on, all or none.

        Raises:
            Refusal: there is no room (429) or never is for so many (400), or the server stops or has failed (503).
        """
        most = self.slots.rows + self.queue
        if len(tickets) > most:
            raise Refusal(
                400,
                f"the request asks for {len(tickets)} texts, prompts times n, and at most {most} are taken here; ask "
                "for fewer at a time, or start the server with more --slots or a longer --queue",
            )
        with self._changed:
            self.check()
            if len(tickets) > most - self.open:
                raise Refusal(
                    429,
                    f"{self.open} texts are being made or wait, and {most} may; try again later, or start the server "
                    "with more --slots or a longer --queue",
                    code="rate_limit_exceeded",
                    retry=1,
                )
            self._waiting.extend(tickets)
            self._changed.notify()

    def check(self) -> None:
        """Refuse where nothing is taken on.

        Raises:
            Refusal: the server stops, or its decoding has failed (503).
        """
        if self._closing is not None:
            raise Refusal(503, CLOSING, retry=5)
        if not self.alive:
            raise Refusal(503, f"the decoding has stopped: {self.failure}; restart the server")

    def cancel(self, ticket: Ticket, reason: str = "cancelled") -> None:
        """Nobody waits for a text any more; its slot is free at the next look. Of several reasons the first counts."""
        ticket.cancelled = ticket.cancelled or reason

    def close(self, grace: float) -> None:
        """Take nothing on, and end what is not done after `grace` seconds; returns at once."""
        with self._changed:
            ends = time.monotonic() + grace
            self._closing = ends if self._closing is None else min(ends, self._closing)
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for the thread to end, which it does some time after `close`."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def open(self) -> int:
        """Texts that were taken on and have not ended."""
        return len(self._waiting) + len(self._reading) + len(self._running)

    @property
    def alive(self) -> bool:
        """Whether texts are being made."""
        return self._thread.is_alive() and not self._unusable

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self.open and self._closing is None:
                    self._count()
                    self._changed.wait()
                if not self.open:
                    return
            try:
                self._turn()
            except Exception as error:  # whatever it was, nobody may wait for ever
                if not self._failed(error):
                    return

    def _turn(self) -> None:
        self._sweep()
        left = self.piece
        # what a last piece would leave is too little to share out
        while 2 * left > self.piece and self._take(left):
            left -= self._read(left)
        if self._running:
            self._decode()
        self._count()
        self._deliver()

    def _sweep(self) -> None:
        """End what nobody waits for, what took too long, and when the server stops everything."""
        now = time.monotonic()
        closed = self._closing is not None and now >= self._closing

        def verdict(ticket: Ticket) -> tuple[str, Refusal] | None:
            if ticket.cancelled is not None:
                return ticket.cancelled, Refusal(499, "the client has gone")
            if closed:
                return "closing", Refusal(503, CLOSING, retry=5)
            if now < ticket.deadline:
                return None
            took = f"{now - ticket.born:.0f} s are over, the most that a request may take"
            if ticket.made:
                return "timeout", Refusal(504, f"{took}; ask for fewer tokens", code="timeout")
            return "timeout", Refusal(503, f"{took}, and its turn has not come", code="timeout", retry=5)

        for row in reversed(range(len(self._running))):
            found = verdict(self._running[row])
            if found is not None:
                self._refuse(self._leave(row), *found)
        for prompt in reversed(range(len(self._reading))):
            found = verdict(self._reading[prompt])
            if found is not None:
                self.slots.forget(prompt)
                self._refuse(_without(self._reading, prompt), *found)
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            for ticket in waiting:
                found = verdict(ticket)
                if found is None:
                    self._waiting.append(ticket)
                else:
                    self._refuse(ticket, *found)

    def _take(self, budget: int) -> bool:
        """Whether prompts are to be read: those begun, and of those that wait what fits and has a slot to go to."""
        taken = sum(min(len(ticket.prompt) - ticket.read, self.wide) for ticket in self._reading)
        while len(self._reading) < min(self.slots.prompts, self.slots.rows - len(self._running)):
            with self._changed:
                if not self._waiting:
                    break
                taken += min(len(self._waiting[0].prompt), self.wide)
                if self._reading and taken > budget:
                    break
                self._reading.append(self._waiting.popleft())
            self.slots.begin()
        return bool(self._reading)

    def _read(self, budget: int) -> int:
        """A piece of every prompt that is being read; with its last one each gets its slot. Returns tokens computed."""
        reading = self._reading
        width = widest([len(ticket.prompt) - ticket.read for ticket in reading], budget)
        pieces = [ticket.prompt[ticket.read : ticket.read + width] for ticket in reading]
        logits = self.slots.read(pieces)
        for ticket, piece in zip(reading, pieces, strict=True):
            ticket.read += len(piece)
            self.metrics.prompt_tokens.inc(len(piece))
        done = [prompt for prompt, ticket in enumerate(reading) if ticket.read == len(ticket.prompt)]
        if done:
            first = len(self._running)
            made = self.slots.admit(done, logits[done], [reading[prompt].wish for prompt in done])
            self._running += [reading[prompt] for prompt in done]
            for prompt in reversed(done):
                ticket = _without(reading, prompt)
                self.metrics.first.observe(time.monotonic() - ticket.born)
            for row in reversed(range(first, len(self._running))):
                self._give(row, made, row - first)
        return width * len(pieces)

    def _decode(self) -> None:
        made = self.slots.run(min(self.every, max(ticket.most - ticket.made for ticket in self._running)))
        for row in reversed(range(len(self._running))):
            self._give(row, made, row)

    def _give(self, row: int, made: Made, index: int) -> None:
        """Hand out the tokens of a row, which stand at `index` of what was made, and free the row if they end it."""
        ticket = self._running[row]
        ids, end, refusal, count = [], None, None, 0
        row_ids = made.tokens[index].tolist()
        for token in row_ids:
            count += 1
            if token == NO_NUMBER:
                count -= 1
                refusal = Refusal(
                    500,
                    "the model gives NaN or infinity for this text: its numbers overflow, or weights are damaged",
                )
                break
            if token in ticket.ends or (token in self.eos and not ticket.endless):
                end = "stop"
                break
            ids.append(token)
            if ticket.made + count >= ticket.most:
                end = "length"
                break
        ticket.made += count
        self.metrics.tokens.inc(count)
        scores = [] if ticket.wish.scores is None else _scores(made, index, ids, ticket.wish.scores)
        if refusal is not None:
            self._leave(row, broken=True)
            self._refuse(ticket, "failed", refusal)
            return
        self._outbox.append((ticket, Piece(ids, count, scores, end)))
        if end is not None:
            self._leave(row, broken=NO_NUMBER in row_ids)
            self._ended(ticket, end)

    def _leave(self, row: int, *, broken: bool = False) -> Ticket:
        """Free a row; the last text takes it."""
        self.slots.drop(row, broken=broken)
        return _without(self._running, row)

    def _refuse(self, ticket: Ticket, reason: str, refusal: Refusal) -> None:
        self._outbox.append((ticket, Piece([], refusal=refusal)))
        self._ended(ticket, reason)

    def _ended(self, ticket: Ticket, reason: str) -> None:
        self.metrics.ended.labels(reason).inc()
        self.metrics.seconds.observe(time.monotonic() - ticket.born)

    def _deliver(self) -> None:
        outbox, self._outbox = self._outbox, []
        if not outbox:
            return

        def put() -> None:
            for ticket, piece in outbox:
                ticket.put(piece)

        try:
            self._post(put)
        except RuntimeError as error:  # the event loop has closed: nobody is there
            log.debug("nobody takes what was made: %s", error)

    def _count(self) -> None:
        self.metrics.running.set(len(self._running))
        self.metrics.waiting.set(self.open - len(self._running))

    def _failed(self, error: Exception) -> bool:
        """End every text that the error may have touched; False: the slots cannot be used any more."""
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        self.failure = (
            "there is too little memory; start the server with fewer --slots" if memory else repr(error)
        )
        log.error("texts in slots are lost: %s", self.failure, exc_info=None if memory else error)
        lost = [*self._running, *self._reading]
        self._running, self._reading = [], []
        usable = True
        try:
            self.slots.clear()
        except Exception as second:
            usable, self.failure = False, f"{self.failure}; then {second!r}"
            log.error("the slots cannot be used any more: %s", second)
            with (
                self._changed
            ):  # before anybody is told, so that nobody comes in whom the thread would not see
                self._unusable = True
                lost += self._waiting
                self._waiting.clear()
        for ticket in lost:
            self._refuse(ticket, "failed", Refusal(500, f"the decoding failed: {self.failure}"))
        self._deliver()
        return usable


def _without(tickets: list[Ticket], index: int) -> Ticket:
    """Take one out; the last fills its place, as it does in the slots."""
    ticket, last = tickets[index], tickets.pop()
    if last is not ticket:
        tickets[index] = last
    return ticket


def _scores(made: Made, row: int, ids: list[int], most: int) -> list[Score]:
    found = []
    assert made.scores is not None
    for token, scores in zip(ids, made.scores, strict=False):
        ids_, values = scores.ids[row].tolist()[:most], scores.top[row].tolist()[:most]
        chosen = max(float(scores.chosen[row]), LEAST)
        found.append(
            Score(token, chosen, tuple((i, max(x, LEAST)) for i, x in zip(ids_, values, strict=True)))
        )
    return found
