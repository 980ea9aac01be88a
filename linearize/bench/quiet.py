"""Processes that share a device stand still while one of them times: a step beside others' steps took a third more.

They compile at once, and what compiles also launches whenever it is ready. So whoever times stops the others'
processes for those seconds (SIGSTOP), waits until what they had launched is done, and lets them go on. Should it be
killed meanwhile, a process that it began for that lets them go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

TURN = "turn.lock"
"""The file that whoever times holds."""
FOLDER = "processes"
"""Of files that are named after processes, and hold when they began."""
MOST = 60
"""Seconds after which the others go on whatever happens."""
QUEUED = 20.0
"""Seconds at most that are waited for what stopped processes had launched; steps of theirs may stand in line."""


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
def alone(folder: Path | None, most: int | None = None) -> Iterator[None]:
    """Inside, it is this process's turn on the device, and the others that are known in a folder stand still.

    Args:
        folder: that the processes share; None: nobody else is there.
        most: seconds after which the others go on whatever happens (default: `MOST`).
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / TURN), others(folder, most):
        yield


def follow(folder: Path, roots: list[int]) -> list[int]:
    """Make processes and all that they have begun known, so that they stand still too; gives those found.

    For programs that know nothing of turns, such as tests: whoever began them calls this again and again.

    Args:
        folder: that the processes share.
        roots: numbers of processes.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    left = list(roots)
    while left:
        pid = left.pop()
        began = _began(pid)
        if began is not None and pid not in found:
            found.append(pid)
            (folder / FOLDER / str(pid)).write_text(began, encoding="utf-8")
            left += children.get(pid, [])
    return found


@contextmanager
def others(folder: Path | None, most: int | None = None) -> Iterator[None]:
    """Inside, the other processes that are known in a folder stand still, so long at most; None: nobody is there."""
    found = [] if folder is None else [pid for pid in _known_in(folder / FOLDER) if pid != os.getpid()]
    if not found:
        yield
        return
    again = ["sh", "-c", f"sleep {MOST if most is None else most}; kill -CONT {' '.join(map(str, found))}"]
    watch = subprocess.Popen(
        again, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _signal(found, signal.SIGSTOP)
        _until_idle()
        yield
    finally:
        _signal(found, signal.SIGCONT)
        os.killpg(watch.pid, signal.SIGKILL)
        watch.wait()


def _until_idle() -> None:
    """Until every device that this process may use says that it does nothing; at once where nothing tells."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    asked = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    asked += [] if not visible else ["-i", visible]
    end = time.monotonic() + QUEUED
    while time.monotonic() < end:
        try:
            said = subprocess.run(
                asked, capture_output=True, text=True, timeout=10, check=True
            ).stdout.split()
        except (OSError, subprocess.SubprocessError):
            return
        if not any(share.isdecimal() and int(share) for share in said):
            return
        time.sleep(0.2)


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
