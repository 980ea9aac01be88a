"""Pieces of prompts whose shape comes again and again, each shape recorded as a CUDA graph.

Reading a piece launches hundreds of kernels a layer, and a card reads eight thousand tokens in less time than the host
takes to launch them. Long prompts are read in pieces of one shape, so that the launches can be recorded once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from linearize.recording import record

log = logging.getLogger(__name__)

SEEN = 2
"""Calls of a shape before it is recorded: kernels compile, libraries allocate, and rare shapes are not worth it."""
MOST = 6
"""Graphs that are kept; each holds the memory of a piece."""

Read = Callable[[Tensor, Tensor], Tensor]
"""Reads ids [P, T] at places [P, T] into what the rows hold, by no other tensor that may move; logits [P, V]."""


class Recorded:
    """One shape's graph and the tensors that it reads."""

    def __init__(self, read: Read, ids: Tensor, places: Tensor) -> None:
        self._ids, self._places = ids.clone(), places.clone()
        with torch.cuda.device_of(ids):
            self._graph, self._logits = record(lambda: read(self._ids, self._places))

    def __call__(self, ids: Tensor, places: Tensor) -> Tensor:
        self._ids.copy_(ids)
        self._places.copy_(places)
        self._graph.replay()
        # the next replay writes there
        return self._logits.clone()


class Pieces:
    """Reads pieces, recorded where that is possible.

    Args:
        records: whether anything is to be recorded.

    Attributes:
        obstacle: why nothing is recorded any more although it was to be, or None.
    """

    def __init__(self, records: bool) -> None:
        self._records = records
        self._seen: dict[tuple[int, int, bool], int] = {}
        self._graphs: dict[tuple[int, int, bool], Recorded] = {}
        self.obstacle: str | None = None

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
        known = self._graphs.pop(key, None)
        if known is None and self._seen.get(key, 0) >= SEEN:
            try:
                known = Recorded(read, ids, places)
            except RuntimeError as error:
                self._records, self.obstacle = False, " ".join(str(error).split())[:200]
                self._graphs.clear()
                log.warning("prompts are read as they come, which is slower: %s", self.obstacle)
                return read(ids, places)
        if known is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            return read(ids, places)
        # the one that was used last is the last
        self._graphs[key] = known
        while len(self._graphs) > MOST:
            self._graphs.pop(next(iter(self._graphs)))
        return known(ids, places)
