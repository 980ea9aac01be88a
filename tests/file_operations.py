"""A run in a forked process in which every change of its folder can be the last one, or be refused by a full disk."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linearize import storing
from linearize.errors import LinearizeError

KILLED = 9
REFUSED = 2
"""Exit code of a run that ended in a `LinearizeError`."""
BROKEN = 1
"""Exit code of one that ended in a traceback."""
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Operations:
    """Counts what changes a folder, through an audit hook, and does something at the n-th time.

    Args:
        folder: what happens in it counts.
        at: number of the operation, from 1; 0 for none.
        action: done before that operation happens; may raise.
    """

    def __init__(self, folder: Path, at: int = 0, action: Callable[[Operations], None] | None = None) -> None:
        self.folder = str(folder)
        self.at = at
        self.action = action
        self.count = 0
        self.before: Path | None = None
        """The file that the operation before this one has opened for writing, if it was one."""

    def install(self) -> None:
        """From here on, for the rest of this process."""
        sys.addaudithook(self._on_event)
        original = storing.save_file

        def save_file(tensors: Any, path: Any, *arguments: Any) -> None:
            self._happens(Path(path))  # written in Rust, which tells no hook
            original(tensors, path, *arguments)

        storing.save_file = save_file

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike) or not flags & _WRITING:
                return
            if self._is_inside(path):
                self._happens(Path(os.fsdecode(path)))
        elif event in _CHANGES:
            # os.rename tells of two places, the others of one; -1 is no folder
            folder = next(
                (number for number in arguments[1:] if type(number) is int and 2 < number < 1000), None
            )
            if event == "os.chmod" or event == "os.mkdir":
                folder = arguments[2] if arguments[2] != -1 else None
            if self._is_inside(arguments[0], folder):
                self._happens(None)

    def _is_inside(self, path: Any, folder: int | None = None) -> bool:
        name = os.fsdecode(path) if not isinstance(path, int) else os.readlink(f"/proc/self/fd/{path}")
        if folder is not None and not os.path.isabs(name):
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        return os.path.abspath(name).startswith(self.folder)

    def _happens(self, written: Path | None) -> None:
        self.count += 1
        if self.count == self.at and self.action is not None:
            self.action(self)
        self.before = written


def kill(operations: Operations) -> None:
    """End the process as SIGKILL does, in the middle of the write before, if there was one."""
    torn = operations.before
    if torn is not None and torn.is_file():
        size = torn.stat().st_size
        # a line of metrics is cut, not the lines before it
        os.truncate(torn, size - min(size, 3) if torn.suffix == ".jsonl" else size // 2)
    os._exit(KILLED)


def fill_the_disk(operations: Operations) -> None:
    """Refuse the operation for want of space."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operations.folder)


def forked(job: Callable[[], object], operations: Operations, log: Path) -> tuple[int, int]:
    """Run a job in a copy of this process.

    Args:
        job: what to do there.
        operations: installed there.
        log: gets what the job writes.

    Returns:
        Exit code (0, `KILLED`, `REFUSED` or `BROKEN`) and the operations counted.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            sys.stdout = sys.stderr = output = log.open("w", encoding="utf-8", buffering=1)
            operations.install()
            job()
            code = 0
        except LinearizeError as error:
            output.write(f"{error}\n")  # flushed by the line
            code = REFUSED
        except BaseException:
            output.write(traceback.format_exc())
        finally:
            os.write(write, str(operations.count).encode())
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        count = stream.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(count or 0)
