"""Ends a process that waits on its card for another one that is gone.

Over NCCL such a wait has no error: the host waits for the card, the card for the other's part of the weights or of the
sequence, and half an hour goes by. So every process has a connection to the first one, on which nothing is said until
it leaves. Where it breaks, all of them hear so; whoever is then in a pass, and does not come out of it by itself, says
why and ends. Plain sockets: a thread that waits inside torch would bring Python down with it when that ends.
"""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from linearize import launched

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds in which a process may come out of a pass by itself."""
CONNECTED = 20.0
"""Seconds in which they have to find each other."""
LEAVES, LOST = b".", b"x"
WHERE = "watch"
"""Key of the store: where the first process listens."""


class Watch:
    """This process's connection to the others.

    Args:
        store: of the processes.
        rank, size: number of this one, and how many there are.
        last_words: makes of what was lost the message that is shown.
        exit_code: of a process that is ended.
    """

    def __init__(
        self, store: Any, rank: int, size: int, last_words: Callable[[str], str], exit_code: int
    ) -> None:
        self.last_words, self.exit_code = last_words, exit_code
        self._left = threading.Event()
        self._passing = 0.0
        """Since when this process is in a pass; 0: it is in none."""
        self._peers: list[socket.socket] = []
        try:
            self._peers = _accepted(store, size) if rank == 0 else [_connected(store)]
        except OSError as error:
            log.info("processes do not hear each other leave (%s): one that is gone is missed later", error)
            return
        for peer in self._peers:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=self._listen, daemon=True, name="watch").start()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around what waits for other processes on the device, and is worth nothing without them."""
        self._passing = time.monotonic()
        try:
            yield
        finally:
            self._passing = 0.0

    def leave(self, done: bool) -> None:
        """Stop listening, and let the others know whether something is lost with this process."""
        self._left.set()
        for peer in self._peers:
            with suppress(OSError):
                if done:
                    peer.sendall(LEAVES)
                peer.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as waiting:
            for peer in self._peers:
                waiting.register(peer, selectors.EVENT_READ)
            while waiting.get_map():
                for key, _ in waiting.select():
                    peer: Any = key.fileobj
                    try:
                        said = peer.recv(1)
                    except OSError:
                        said = b""
                    if said == LEAVES:
                        waiting.unregister(peer)
                        continue
                    for other in self._peers:
                        with suppress(OSError):
                            other.sendall(LOST)
                    self._end_unless_it_ends()
                    return

    def _end_unless_it_ends(self) -> None:
        began = 0.0
        heard = time.monotonic()
        while not self._left.wait(0.2):
            if self._passing != began:
                # from one pass into the next: it waits for nobody
                began, heard = self._passing, time.monotonic()
            elif began and time.monotonic() - heard > PATIENCE:
                if launched.shows_errors():
                    sys.stderr.write(f"{self.last_words('its connection was closed')}\n")
                    sys.stderr.flush()
                os._exit(self.exit_code)


def _accepted(store: Any, size: int) -> list[socket.socket]:
    """A connection to each of the others, which know the word that is in the store."""
    word, found = secrets.token_hex(16), list[socket.socket]()
    try:
        with socket.create_server((_own_address(), 0), backlog=size) as server:
            server.settimeout(CONNECTED)
            host, port = server.getsockname()[:2]
            store.set(WHERE, f"{word} {port} {host}")
            while len(found) < size - 1:
                peer, _ = server.accept()
                peer.settimeout(CONNECTED)
                if _read(peer, len(word)) == word.encode():
                    peer.settimeout(None)
                    found.append(peer)
                else:
                    peer.close()
    except OSError:
        store.set(WHERE, "")
        for peer in found:
            with suppress(OSError):
                peer.sendall(LEAVES)
        raise
    return found


def _connected(store: Any) -> socket.socket:
    said = store.get(WHERE).decode()
    if not said:
        raise OSError("the first process cannot be reached")
    word, port, host = said.split()
    found = socket.create_connection((host, int(port)), timeout=CONNECTED)
    found.sendall(word.encode())
    found.settimeout(None)
    return found


def _read(peer: socket.socket, count: int) -> bytes:
    found = b""
    with suppress(OSError):
        while len(found) < count and (more := peer.recv(count - len(found))):
            found += more
    return found


def _own_address() -> str:
    """Of this machine, as seen by those that find the store."""
    at = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((at, 9))  # nothing is sent
        return str(probe.getsockname()[0])
