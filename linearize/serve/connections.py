"""Connections: so many and no more, what is no HTTP is told so, and none that stands still is waited for for ever."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from linearize.serve.answers import as_json
from linearize.serve.metrics import Metrics
from linearize.serve.refusal import Refusal

LONGEST_HEAD = 2**16
"""Bytes of a request's head."""
SPARE = 64
"""Files that a process has open beside its connections, generously."""
TOLD = "linearize.told"
"""Name in a request's scope of the status that its client was told before the endpoint could say one."""
HEAD = 30.0
"""Seconds that the head of a request may take, counted from the connection's first byte or the answer before."""
LINGER, MOST_UNREAD = 2.0, 2**22
"""Seconds and bytes that are read behind the refusal of what is no HTTP."""
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


def most() -> int | None:
    """How many connections there may be, so that files are left for everything else; None where nothing says."""
    if sys.platform == "win32":
        return None
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if files == resource.RLIM_INFINITY else max(files - SPARE, 1)


def protocol(metrics: Metrics) -> type[H11Protocol]:
    """uvicorn's connections, except that what never comes to an endpoint gets OpenAI's error object, and is counted.

    uvicorn answers requests that HTTP itself refuses with a line of text, and with an error in its log where another
    answer has been given already (a body of chunks that goes wrong behind a 413). Where all files that a process may
    open are taken by connections, nobody is told anything, and asyncio's log fills with tracebacks.

    Args:
        metrics: to count in.
    """
    limit = most()

    class Connection(H11Protocol):
        _unread: int | None = None
        """Bytes that may still come behind a refusal, and are thrown away."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if limit is not None and len(self.connections) > limit:
                self._refuse(
                    Refusal(
                        503,
                        f"{limit:,} connections are open, as many as this process may have; try again later, or raise "
                        "`ulimit -n` where the server is started",
                        retry=1,
                    )
                )

        def send_400_response(self, msg: str) -> None:
            error = sys.exception()  # of h11; uvicorn hands on a word of its own
            reason = str(error or msg).partition(": bytearray")[0][:200]
            self._refuse(
                Refusal(
                    getattr(error, "error_status_hint", 400),
                    f"this is no request of HTTP/1.1: {reason}; heads have at most {LONGEST_HEAD:,} bytes, and there "
                    "is no TLS here",
                ),
                rest=True,
            )

        def _refuse(self, refusal: Refusal, *, rest: bool = False) -> None:
            """Say so, unless another answer has been given already, and close; with `rest` once some more is read."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                if self.cycle is not None and not self.cycle.response_complete:
                    self.cycle.scope[TOLD] = refusal.status  # type: ignore[literal-required]
                else:
                    metrics.requests.labels("other", str(refusal.status)).inc()
                self._say(refusal)
                if rest and self.transport.can_write_eof():
                    # bytes that lie unread when a connection is closed reset it, and the client may lose the answer
                    self.transport.write_eof()
                    self._unread = MOST_UNREAD
                    self.loop.call_later(LINGER, self.transport.close)
                    return
            self.transport.close()

        def data_received(self, data: bytes) -> None:
            if self._unread is None:
                super().data_received(data)
                return
            self._unread -= len(data)
            if self._unread < 0:
                self.transport.close()

        def _say(self, refusal: Refusal) -> None:
            body = as_json(refusal.body())
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
                **refusal.headers,
            }
            head = h11.Response(
                status_code=refusal.status,
                headers=list(headers.items()),
                reason=STATUS_PHRASES[refusal.status],
            )
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")

    return Connection
