"""Pieces of prompts whose shape comes again and again, each shape recorded as a CUDA graph.

Reading a piece launches hundreds of kernels a layer, and a card reads eight thousand tokens in less time than the host
takes to launch them. Long prompts are read in pieces of one shape, so that the launches can be recorded once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.recording import record

log = logging.getLogger(__name__)

SEEN = 2
"""Calls of a shape before it is recorded: kernels compile, libraries allocate, and rare shapes are not worth it."""
MOST = 6
"""Graphs that are kept, in the memory of the largest piece."""
OFTEN = 2
"""A shape takes another's place once it has come so many times as often: a recording costs more than a reading."""
REMEMBERED = 4096
"""Calls after which what was counted counts half, so that what is asked for today decides."""

Read = Callable[[Tensor, Tensor], Tensor]
"""Reads ids [P, T] at places [P, T] into what the rows hold, by no other tensor that may move; logits [P, V]."""
Key = tuple[int, int, bool]
"""Prompts, tokens of each, and whether any has read something before."""


class Recorded:
    """One shape's graph and the tensors that it reads.

    Args:
        read, ids, places: see `Pieces`.
        beside: another shape's, whose memory is used as well: one is replayed at a time, and what it gave is copied.
    """

    def __init__(self, read: Read, ids: Tensor, places: Tensor, beside: Recorded | None = None) -> None:
        self._ids, self._places = ids.clone(), places.clone()
        with torch.cuda.device_of(ids):
            self._graph: Any
            self._graph, self._logits = record(
                lambda: read(self._ids, self._places), None if beside is None else beside._graph
            )

    def __call__(self, ids: Tensor, places: Tensor) -> Tensor:
        self._ids.copy_(ids)
        self._places.copy_(places)
        self._graph.replay()
        # the next replay writes there
        return self._logits.clone()


class Pieces:
    """Reads pieces, recorded where that is possible and leaves room to read those that are not.

    Recorded pieces keep memory that those read as they come, in shapes that are rare or padded, do not get. So a shape
    is recorded while that leaves as much as the recorded ones hold, and none is where the first does not fit so.

    Args:
        records: whether anything is to be recorded.

    Attributes:
        obstacle: why nothing is recorded any more although it was to be, or None.
    """

    def __init__(self, records: bool) -> None:
        self._records, self._full = records, False
        self._seen: dict[Key, int] = {}
        self._graphs: dict[Key, Recorded] = {}
        self._holds = 0
        self.obstacle: str | None = None

    @property
    def records(self) -> bool:
        """Whether shapes are recorded."""
        return self._records

    def __call__(self, read: Read, ids: Tensor, places: Tensor, *, behind: bool) -> Tensor:
        """Logits [P, V] of what follows.

        Args:
            read: see `Read`.
            ids, places: [P, T].
            behind: whether any row has read something before; models ask for that on the host.
        """
        if not self._records:
            return read(ids, places)
        key = (*ids.shape, behind)
        self._count(key)
        if key not in self._graphs and self._worth(key):
            self._record(key, read, ids, places)
        known = self._graphs.get(key)
        if known is not None:
            return known(ids, places)
        # not where a recording's error is handled, whose frames would keep what it had taken
        try:
            return read(ids, places)
        except torch.OutOfMemoryError:
            if self._graphs:
                self.give_up("memory ran out beside recorded pieces")
            raise

    def give_up(self, why: str) -> None:
        """Free what recorded pieces hold; from now on pieces are read as they come."""
        if self._records:
            self._records, self.obstacle = False, why
            self._graphs.clear()
            log.warning("prompts are read as they come, which is slower: %s", why)

    def _count(self, key: Key) -> None:
        self._seen[key] = self._seen.get(key, 0) + 1
        if sum(self._seen.values()) > REMEMBERED:
            self._seen = {each: count // 2 for each, count in self._seen.items() if count > 1}

    def _worth(self, key: Key) -> bool:
        seen = self._seen.get(key, 0)  # none where counting it has halved the counts
        if self._full or seen <= SEEN:
            return False
        return len(self._graphs) < MOST or seen > OFTEN * self._seen.get(self._rarest(), 0)

    def _rarest(self) -> Key:
        return min(self._graphs, key=lambda key: self._seen.get(key, 0))

    def _record(self, key: Key, read: Read, ids: Tensor, places: Tensor) -> None:
        """Record a shape if there is room for it, and otherwise say so."""
        try:
            taken, free = memory(ids.device)
            if self._graphs and free < 2 * self._holds:
                self._full = True
                log.info("no further shape of prompts is recorded: %s", _short(free, 2 * self._holds))
                return
            if len(self._graphs) >= MOST:
                del self._graphs[self._rarest()]
            made = Recorded(read, ids, places, next(iter(self._graphs.values()), None))
            before, (taken, free) = taken, memory(ids.device)
            self._holds += max(taken - before, 0)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
        else:
            if free >= self._holds:
                self._graphs[key] = made
                return
            why = _short(free, self._holds)
        self.give_up(why)


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes that torch has taken of a GPU, what it had and no longer uses given back, and that are free there."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]


def _short(free: int, wanted: int) -> str:
    mib = 2**20
    return f"{free / mib:,.0f} MiB are free, and {wanted / mib:,.0f} are wanted beside recorded pieces"
