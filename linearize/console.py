"""Where the commands write: results to standard output, messages to standard error."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from linearize import launched

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, which has no width of its own."""


def console() -> Console:
    """For results."""
    from rich.console import Console

    class Results(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with code 1; the command line has its own answer

    return Results(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def error_console() -> Console:
    """For errors and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class _Unread(io.FileIO):
    """A descriptor that takes whatever is written to it."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            written = super().write(data)
            if written is not None:
                return written
        return len(data)


def sound_streams() -> None:
    """Standard output and error of this process as ones that no text breaks, and error as one that nothing does.

    What a stream's encoding lacks is written in escapes, and a closed stream takes everything in silence. Messages that
    cannot be delivered, to a reader that has gone, a disk that is full or a terminal that was hung up, are dropped: a
    day's training does not end for their sake.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # of a closed descriptor the next file that is opened would get the number, and what libraries print there
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            if stream.errors in ("strict", "surrogateescape"):
                stream.reconfigure(errors="backslashreplace")
            if name == "stderr":
                raw = io.BufferedWriter(_Unread(stream.fileno(), "wb", closefd=False))
                sys.stderr = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)


CHATTY = ("accelerate", "huggingface_hub", "peft", "torch.utils._pytree", "torchao")
"""Libraries whose warnings nobody who runs a command can do anything about; torchao's come when it is imported."""


class _Lines(logging.Handler):
    """Messages of the package's loggers as plain lines, above a progress bar where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        error_console().print(self.format(record), markup=False, soft_wrap=True)


@contextmanager
def messages() -> Iterator[None]:
    """Inside, what the package reports (a download, a conversion, a text that is read twice) goes to standard error.

    What libraries say below an error is hidden from here on, see `quiet_libraries`.
    """
    # of several processes the first one speaks for all
    log, lines = logging.getLogger("linearize"), _Lines(logging.INFO if launched.first() else logging.ERROR)
    level = log.level
    _hush()  # whichever of a command's imports brings them in
    log.addHandler(lines)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(level)


def quiet_libraries() -> None:
    """Hide what libraries say below an error, and their bars but for the hub's downloads; imports transformers.

    ``TRANSFORMERS_VERBOSITY`` and ``python -W`` bring the messages back.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    _hush()  # the hub's sets its own level when it is imported
    hub_bars = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # the hub's as well
    if hub_bars:
        enable_progress_bars()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    if not sys.warnoptions:
        for category in (FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category)


def _hush() -> None:
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def size(count: float) -> str:
    """Bytes as people read them: 912 B, 13.5 KiB, 2.10 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return (
        f"{count:.0f} {unit}"
        if unit == "B"
        else f"{count:.3g} {unit}"
        if count < 100
        else f"{count:,.0f} {unit}"
    )
