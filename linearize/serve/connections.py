"""Connections that stand still: no request is waited for for ever, and no client that does not read its answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEAD = 30.0
"""Seconds that the head of a request may take, counted from the connection's first byte or the answer before."""
UNREAD = 30.0
"""Seconds that an answer's last bytes may lie unread beyond the time that its request may take."""


class Patience:
    """How long connections of uvicorn's have stood as they stand.

    uvicorn itself closes one that is quiet after an answer, but a head that never ends, or an answer that its client
    does not read, holds a connection as long as the client likes, and there are only so many.

    Args:
        seconds: that a request may take.
    """

    def __init__(self, seconds: float) -> None:
        self._idle, self._busy = min(HEAD, seconds), seconds + UNREAD
        self._since: dict[Any, tuple[tuple[int, bool], float]] = {}

    def over(self, connections: Iterable[Any], now: float) -> list[Any]:
        """Connections that have stood still for too long; called about once a second.

        Args:
            connections: protocols of uvicorn, each with the request that it is at, or was at last, as `cycle`.
            now: of `time.monotonic`.
        """
        seen, found = {}, []
        for connection in connections:
            cycle = connection.cycle
            idle = cycle is None or cycle.response_complete
            state = id(cycle), idle
            before, since = self._since.get(connection, (state, now))
            seen[connection] = state, since if before == state else now
            if now - seen[connection][1] > (self._idle if idle else self._busy):
                found.append(connection)
        self._since = seen
        return found


def drop(connections: Iterable[Any]) -> None:
    """Close connections at once, as if their clients had gone: what runs for them ends by itself."""
    for connection in list(connections):
        connection.transport.abort()
