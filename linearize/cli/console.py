"""Where the commands write: results to standard output, messages to standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, which has no width of its own."""


def console() -> Console:
    """For results."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def error_console() -> Console:
    """For errors and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def quiet_when_piped() -> None:
    """No progress bars of transformers in a log file, where each step of a bar is a line; imports transformers."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


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
