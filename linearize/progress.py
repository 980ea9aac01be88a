"""How far a long job has come: a bar on a terminal, a plain line every ten seconds anywhere else.

The numbers that matter while one waits are the same in both forms: share done, loss (or whatever the caller
passes), tokens per second, time left.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from linearize import launched

INTERVAL = 10.0
"""Seconds between two plain lines."""
BAR = 24
"""Characters of a bar where there is room."""
SMOOTHING = 30.0
"""Seconds that the shown speed is averaged over."""


class Meter:
    """Progress of one job, as a context manager.

    Writes to standard error, so that what a command prints stays clean. On a terminal it is a live bar; in a
    log file it is one line about every ten seconds, and one at the end.

    Args:
        title: what runs ("stage 1/2 transfer").
        total: units in the whole job, or None when unknown.
        unit: name of the units, for the speed.
        done: units that an earlier run has done (resume); they count as progress, not as speed.
        console: where to write; default standard error.

    Example:
        >>> with Meter("transfer", total=1_000_000) as meter:
        ...     meter.advance(8_192, loss=0.12)
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str = "tokens",
        *,
        done: int = 0,
        console: Console | None = None,
    ) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = done
        self._console = console or Console(stderr=True, quiet=not launched.first())
        self._numbers: dict[str, float] = {}
        self._started = self._last_line = time.monotonic()
        self._history: deque[tuple[float, int]] = deque([(self._started, done)])
        self._line_done: int | None = None
        self._bar: Progress | None = None
        self._drawn = BarColumn(bar_width=BAR)
        self._task: TaskID | None = None

    def __enter__(self) -> Meter:
        self._started = self._last_line = time.monotonic()
        self._history = deque([(self._started, self.done)])
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                # where there is little room the bar gives way, then the title, line by line, and never the numbers
                TextColumn("{task.description}", table_column=Column()),
                self._drawn,
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self.done, status=self.status()
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._refresh()
            self._bar.stop()
            self._bar = None
        elif self._line_done != self.done:
            self._line()

    def advance(self, n: int, **numbers: float) -> None:
        """Count `n` more units.

        Args:
            n: units done since the last call; 0 only updates the numbers.
            **numbers: shown beside the progress, for example ``loss=0.31``; each stays until it is given again.
                Pass Python numbers: a GPU tensor would have to be waited for.
        """
        self.done += n
        self._numbers.update(numbers)
        now = time.monotonic()
        self._history.append((now, self.done))
        while len(self._history) > 2 and now - self._history[0][0] > SMOOTHING:
            self._history.popleft()
        if self._bar is not None:
            self._refresh()
        elif now - self._last_line >= INTERVAL:
            self._line()

    def note(self, text: str) -> None:
        """Write a line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @property
    def speed(self) -> float:
        """Units per second over the last half minute; 0 before the first unit."""
        (first, before), (last, after) = self._history[0], self._history[-1]
        return (after - before) / (last - first) if last > first else 0.0

    def status(self) -> str:
        """Share done, numbers, speed and time left, as one line."""
        parts = [f"{count(self.done)}/{count(self.total)}" if self.total else count(self.done)]
        parts += [f"{name} {value:.4g}" for name, value in self._numbers.items()]
        if self.speed > 0:
            parts.append(f"{rate(self.speed)} {self.unit}/s")
            if self.total and self.done < self.total:
                parts.append(f"ETA {duration((self.total - self.done) / self.speed)}")
        return "  ".join(parts)

    def _refresh(self) -> None:
        assert self._bar is not None and self._task is not None
        status = self.status()
        self._drawn.bar_width = min(BAR, max(1, self._console.width - len(self.title) - len(status) - 2))
        self._bar.update(self._task, completed=self.done, status=status)

    def _line(self) -> None:
        self._last_line, self._line_done = time.monotonic(), self.done
        share = f" {100 * self.done / self.total:3.0f}%" if self.total else ""
        self.note(f"{self.title}{share}  {self.status()}")


def count(number: float | None) -> str:
    """A short form of a count: 950, 12.3k, 4.1M, 2.0B."""
    if number is None:
        return "?"
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}" if number < 100 * size else f"{number / size:.0f}{suffix}"
    return f"{number:.0f}"


def rate(speed: float) -> str:
    """A short form of units per second, which below one are not none: 12.3k, 42, 4.2, 0.35."""
    return count(speed) if speed >= 9.95 else f"{speed:.2g}"


def duration(seconds: float) -> str:
    """A short form of a time span: 42s, 3m20s, 2h05m."""
    total = int(seconds + 0.5)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"
