"""One process at a time in a run folder.

The kernel holds the lock and drops it with the process, so a lock that a killed process leaves behind never blocks. On
a file system without such locks the file that names the owner takes its place: whoever creates it owns the folder, and
it is taken over once its owner, if it ran on this host, is gone.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from linearize.errors import RunFolderError
from linearize.storing import could_not_write, is_full, write_json

LOCK = ".lock"
OWNER = ".lock.json"
"""Who holds it: pid, host, started. Apart from the lock itself, which some systems let nobody else read."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_ATTEMPTS = 10
_SETTLING = 0.2
"""Seconds."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder inside the block; it is created, and goes again if it stays empty.

    Args:
        folder: the run folder.

    Raises:
        RunFolderError: another process is in it (the message names process and host), or it cannot be created.
        CheckpointError: the disk is full.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        release = _acquire(folder)
    except OSError as error:
        _remove_empty(missing)
        if is_full(error):
            raise could_not_write(folder, error) from error
        raise RunFolderError(
            f"{folder} cannot be created or written ({error.strerror or error}): choose another folder with --out"
        ) from error
    try:
        yield
    finally:
        release()
        _remove_empty(missing)


def _acquire(folder: Path) -> Callable[[], None]:
    """Take the lock; gives what lets it go."""
    for _ in range(_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            release = _kernel_lock(folder)
        except FileNotFoundError:
            continue  # another process made the folder, failed, and took it away in between
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            release = _owner_file(folder)
        return release
    raise _in_use(folder)


def _kernel_lock(folder: Path) -> Callable[[], None]:
    lock = FileLock(folder / LOCK)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own fall-back, which knows its owner as well
            lock.acquire(timeout=0)
    except Timeout:
        raise _in_use(folder) from None

    def release() -> None:
        for name in (OWNER, LOCK):
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        lock.release()

    try:
        write_json(folder / OWNER, _myself())
    except BaseException:
        release()
        raise
    return release


def _owner_file(folder: Path) -> Callable[[], None]:
    """The lock of a file system without locks: the owner's file, created by one process alone."""
    path, me = folder / OWNER, _myself()
    remedy = f"; if that process is gone, delete {path}"
    (folder / LOCK).unlink(missing_ok=True)
    if _is_gone(_owner(folder)):
        path.unlink(missing_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(me, file)
    except FileExistsError:
        raise _in_use(folder, remedy) from None
    time.sleep(_SETTLING)  # another that saw the same dead owner may have deleted ours for its own
    if _owner(folder) != me:
        raise _in_use(folder, remedy)
    return lambda: path.unlink(missing_ok=True)


def _myself() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _owner(folder: Path) -> dict[str, Any] | None:
    """Who the folder says holds it; waits a moment for an owner that is about to say so."""
    for _ in range(_ATTEMPTS):
        try:
            owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
            if isinstance(owner, dict):
                return owner
        except FileNotFoundError:
            if not (folder / LOCK).exists():
                return None
        except (OSError, ValueError):
            pass  # being written
        time.sleep(0.05)
    return None


def _is_gone(owner: dict[str, Any] | None) -> bool:
    """Whether the owner ran here and does not any more; what runs elsewhere cannot be told."""
    if owner is None or owner.get("host") != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return False


def _in_use(folder: Path, remedy: str = "") -> RunFolderError:
    owner = _owner(folder)
    who = (
        f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('started')})"
        if owner
        else "another process"
    )
    return RunFolderError(
        f"{folder} is in use by {who}: wait until it has ended, or choose another folder with --out{remedy}"
    )


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing, the innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
