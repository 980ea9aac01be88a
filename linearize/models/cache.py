"""Where converted models live, and how a folder gets there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from linearize.errors import CheckpointError
from linearize.modes import open_up

log = logging.getLogger(__name__)

PARTIAL = ".partial-"
"""Marks a folder that is still being built; a name with it is never handed out."""


def cache_dir() -> Path:
    """The folder that holds downloaded and converted models.

    ``LINEARIZE_CACHE`` where it is set, else ``linearize`` under the user's cache folder (``XDG_CACHE_HOME``,
    then ``~/.cache``). It is not created by asking.
    """
    chosen = os.environ.get("LINEARIZE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").expanduser().absolute() / "linearize"


def build_once(
    final: Path, build: Callable[[Path], None], *, usable: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """Make the folder `final` by `build`, at most once, whole or not at all.

    `build` fills a temporary folder beside `final`, which is renamed at the end: whatever stops the process,
    a folder of the final name is a finished one. One process builds, others wait for it; what dead processes
    left is removed.

    Args:
        final: the folder wanted.
        build: writes the content into the (existing, empty) folder it is given.
        usable: whether an existing `final` may be returned as it is; one that may not is built again.

    Returns:
        `final`.

    Raises:
        CheckpointError: the folder cannot be written (full disk, no permission); nothing is left behind.
    """
    if usable(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.parent / f".{final.name}.lock"):
            if usable(final):
                return final
            _build(final, build)
    except OSError as error:
        raise _unwritable(final, error) from error
    return final


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(file: Path) -> str:
    """SHA-256 of a file, remembered by what the system says of it: gigabytes take seconds to read."""
    path, stat = file.resolve(), file.stat()
    # cp -p, rsync -a and tar set st_mtime back; nothing sets st_ctime
    key = [str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    memory = cache_dir() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    try:
        *known, digest = json.loads(memory.read_text(encoding="utf-8"))
        if known == key:
            return str(digest)
    except (OSError, ValueError, TypeError):
        pass  # not remembered yet, or not readable: computed below
    digest = sha256(file)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, suffix=PARTIAL, delete=False) as stream:
            written = Path(stream.name)
            try:
                json.dump([*key, digest], stream)
                stream.flush()
                written.replace(memory)
            finally:  # nobody comes back for it
                written.unlink(missing_ok=True)
    except OSError as error:
        log.debug("the hash of %s is not remembered: %s", file, error)
    return digest


def _build(final: Path, build: Callable[[Path], None]) -> None:
    # Holding the lock, every other temporary folder of this name belongs to a process that is gone.
    for leftover in final.parent.glob(f".{final.name}{PARTIAL}*"):
        log.info("removing %s, left by a process that did not finish", leftover)
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}{PARTIAL}", dir=final.parent))
    try:
        build(temporary)
        open_up(temporary)  # a cache may be shared
        if final.exists():
            log.warning("%s is damaged; it is replaced", final)
            shutil.rmtree(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _locked(path: Path) -> FileLock:
    """The lock of that file, held; says so when it has to wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that prepares %s", path.name.strip(".").removesuffix(".lock"))
        lock.acquire()
    return lock


def _unwritable(final: Path, error: OSError) -> CheckpointError:
    remedy = "free some space or set LINEARIZE_CACHE to a folder on another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "make it writable or set LINEARIZE_CACHE to a folder that is"
    return CheckpointError(
        f"cannot write the model cache {final.parent}: {error.strerror or error}; {remedy}"
    )
