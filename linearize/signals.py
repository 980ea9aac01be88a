"""Being asked to stop: SIGTERM is heard as Ctrl-C is, as an exception that unwinds and cleans up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""The signals that ask a program to stop."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C."""


class Terminated(KeyboardInterrupt):
    """SIGTERM; whatever handles Ctrl-C handles it."""


def code_of(number: int) -> int:
    """The exit code of a program that a signal has stopped: 130 or 143."""
    return 128 + number


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code that goes with what was raised."""
    return code_of(signal.SIGTERM) if isinstance(stop, Terminated) else INTERRUPTED


def abort(number: int, frame: FrameType | None) -> None:
    """Signal handler: stop at once.

    Raises:
        KeyboardInterrupt: `Terminated` for SIGTERM.
    """
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def heard() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`; not where it is ignored, as a parent process may have chosen."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield  # only the main thread may set handlers
        return
    owner = os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # forked, by a data loader for one: that process ends as it always did
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        abort(number, frame)

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_quietly() -> None:
    """From here on Ctrl-C and SIGTERM end the process at once: Python's own leaving would answer with a traceback."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
