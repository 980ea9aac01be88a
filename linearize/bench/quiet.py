"""Processes that share a device stand still while one of them times: a step beside others' steps took a third more.

They compile at once, and what compiles also launches whenever it is ready. So whoever times stops the others'
processes for those seconds (SIGSTOP) and lets them go on. Should it be killed meanwhile, a process that it began for
that lets them go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "processes"
"""Of files that are named after processes, and hold when they began."""
MOST = 60
"""Seconds after which the others go on whatever happens."""


@contextmanager
def known(folder: Path) -> Iterator[None]:
    """Inside, this process may be stopped by others that know the folder."""
    mine = folder / FOLDER / str(os.getpid())
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text(_began(os.getpid()) or "", encoding="utf-8")
    try:
        yield
    finally:
        mine.unlink(missing_ok=True)


@contextmanager
def others(folder: Path | None) -> Iterator[None]:
    """Inside, the other processes that are known in a folder stand still; None: there is nobody to stop."""
    found = [] if folder is None else [pid for pid in _known_in(folder / FOLDER) if pid != os.getpid()]
    if not found:
        yield
        return
    again = ["sh", "-c", f"sleep {MOST}; kill -CONT {' '.join(map(str, found))}"]
    watch = subprocess.Popen(
        again, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _signal(found, signal.SIGSTOP)
        yield
    finally:
        _signal(found, signal.SIGCONT)
        os.killpg(watch.pid, signal.SIGKILL)
        watch.wait()


def _known_in(folder: Path) -> list[int]:
    """Processes that are there and began when their files say; another may have got the number of one that died."""
    found = []
    for path in folder.glob("[0-9]*"):
        began = _began(int(path.name))
        with suppress(FileNotFoundError):
            if began is not None and path.read_text(encoding="utf-8") == began:
                found.append(int(path.name))
    return found


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where there is none, or no Linux to tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _signal(found: list[int], number: int) -> None:
    for pid in found:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
