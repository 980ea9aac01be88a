"""A model on a port: slots, scheduler and endpoints put together, run until asked to stop, and taken down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from linearize.decode.choice import unread
from linearize.decode.reach import furthest
from linearize.decode.slots import Slots
from linearize.serve.app import Service, build
from linearize.serve.asked import Limits, Reader
from linearize.serve.connections import LONGEST_HEAD, Patience, drop, protocol
from linearize.serve.metrics import Metrics
from linearize.serve.scheduler import Scheduler
from linearize.serve.settings import Settings, taken
from linearize.signals import STOPPING

log = logging.getLogger(__name__)

STREAM_EVERY = 4
"""Tokens between two looks of the host on a GPU, where a look stalls the device."""
WIDE = 256
"""Tokens of a prompt in one call that fill a GPU's rows; on a CPU others only join where a prompt leaves room."""
BACKLOG = 2048
"""Connections that wait to be taken on."""
TICKS = 10
"""uvicorn's ticks, ten a second, between two looks at connections that stand still."""
LAST_WORDS = 5.0
"""Seconds that answers have to be sent once every text has ended."""


class Served:
    """A model that is ready to be asked.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        settings: how.

    Raises:
        LinearizeError: the model cannot decode rows that come and go, or its states or pieces of prompts do not fit.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.settings = settings
        for name, value in unread(model.generation_config).items():
            log.warning("%s=%r of the model's generation_config.json is not done here", name, value)
        room = furthest(model)
        both = settings.prompt + settings.new
        both = both if room is None else min(both, room)
        limits = Limits(settings.prompt, settings.new, both, settings.body, settings.seconds)
        self.slots = Slots(
            model,
            settings.slots,
            both,
            most=room,
            prompts=min(settings.prompts, settings.slots),
            capture=settings.graph,
        )
        self.slots.prepare()
        rows = model.get_input_embeddings().weight.shape[0]
        reader = Reader(tokenizer, rows, settings.name, limits)
        self._metrics = metrics = Metrics(settings.slots, self.slots.bytes)
        on_gpu = self.slots.device.type == "cuda"
        self.piece = settings.piece or (2048 if on_gpu else 512)
        if on_gpu:
            self.slots.warm(self.piece, min(settings.prompt, both))
        self._loop: asyncio.AbstractEventLoop | None = None
        self.scheduler = Scheduler(
            self.slots,
            eos=_ends(model, tokenizer),
            queue=settings.queue,
            piece=self.piece,
            wide=min(WIDE, self.piece) if on_gpu else self.piece,
            every=STREAM_EVERY if on_gpu else 1,
            metrics=metrics,
            post=self._post,
        )
        self.app = build(Service(reader, self.scheduler, metrics), settings.token)
        self._server: _Server | None = None

    def run(self, listening: socket.socket, ready: Callable[[], None] | None = None) -> None:
        """Answer until asked to stop, by Ctrl-C, SIGTERM or `stop`.

        Args:
            listening: a bound socket, of `bound`.
            ready: called once requests are taken.

        Raises:
            LinearizeError: another has taken the port meanwhile.
        """
        try:
            listening.listen(BACKLOG)
        except OSError as error:
            raise taken(self.settings, error) from None
        config = uvicorn.Config(
            self.app,
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
            backlog=BACKLOG,
            # not whatever happens to be installed: it decides about limits of heads, and what is told of bad ones
            http=protocol(self._metrics),
            h11_max_incomplete_event_size=LONGEST_HEAD,
            ws="none",
            timeout_graceful_shutdown=round(self.settings.grace + 2 * LAST_WORDS),
        )
        self._server = _Server(config, self.settings, self.scheduler)
        asyncio.run(self._serve(listening, ready))

    def stop(self) -> None:
        """As a signal does, from any thread."""
        assert self._server is not None
        self._server.handle_exit(signal.SIGTERM, None)

    async def _serve(self, listening: socket.socket, ready: Callable[[], None] | None) -> None:
        self._loop = asyncio.get_running_loop()
        assert self._server is not None
        self.scheduler.start()
        if ready is not None:
            self._loop.call_soon(ready)
        try:
            await self._server.serve(sockets=[listening])
        finally:
            self.scheduler.close(0)
            await asyncio.to_thread(self.scheduler.join, LAST_WORDS)

    def _post(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call)


class _Server(uvicorn.Server):
    """uvicorn's, which tells the scheduler when it is asked to stop, and then ends as what is done does.

    Until the running texts have ended, or their grace has, it goes on listening, so that who asks is told so.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._settings, self._scheduler = settings, scheduler
        self._patience = Patience(settings.seconds)
        self._ends: float | None = None

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS == 0:
            drop(self._patience.over(self.server_state.connections, time.monotonic()))
        if self._ends is not None and not (self._scheduler.open and time.monotonic() < self._ends):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn would cancel what is left, with a traceback for each
        left = 0.0 if self._ends is None else max(self._ends - time.monotonic(), 0.0)
        end = left + LAST_WORDS
        last = asyncio.get_running_loop().call_later(end, drop, self.server_state.connections)
        try:
            await super().shutdown(sockets)
        finally:
            last.cancel()
            drop(self.server_state.connections)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOPPING}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ends is not None:
            # asked again: no new connections, and the second Ctrl-C waits for nothing
            self.should_exit = True
            super().handle_exit(sig, frame)
            return
        self._scheduler.close(self._settings.grace)
        self._ends = time.monotonic() + self._settings.grace


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return set() if ends is None else set(ends) if isinstance(ends, list | tuple) else {int(ends)}
