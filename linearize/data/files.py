"""Names to local files: what a path, a folder or a glob stands for on this machine; no file is opened."""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from linearize.config.names import TEACHER
from linearize.data import builtin, readers
from linearize.errors import DataError

log = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
"""What can stand under a name besides files and folders; some of them never end."""


def local_files(name: str) -> list[Path] | None:
    """The files a name stands for on this machine, in order; None where it can only be a hub dataset.

    Raises:
        DataError: nothing is there, or something that cannot be read as a file or folder.
    """
    if name == TEACHER:
        raise DataError(
            "the text of 'teacher' is written for training, by `linearize run` and `linearize sample`; name a file "
            "here, or ./teacher for one of that name"
        )
    path = expanded(name)
    mode = mode_of(path)
    if mode is not None:
        return _folder_files(path) if stat.S_ISDIR(mode) else [path]
    if any(mark in name for mark in "*?["):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in found if not stat.S_ISDIR(mode_of(match) or 0)]
        if not files:
            raise DataError(
                f"no file matches '{name}' (seen from {Path.cwd()}); check the pattern, and quote it in a "
                "shell"
            )
        return files
    missing = DataError(
        f"data source '{name}' does not exist: there is no such file or folder{_nearby(path)}"
    )
    if not HUB_NAME.fullmatch(name) or readers.kind(path) or name.startswith(("./", "../", "/", "~")):
        raise missing
    # a misspelt file, though it could be a hub name
    if ("/" in name or path.suffix) and "did you mean" in str(missing):
        raise missing
    near = difflib.get_close_matches(name, [builtin.NAME, TEACHER], n=1, cutoff=0.6)
    if near:
        raise DataError(f"unknown data source '{name}': did you mean '{near[0]}'?")
    return None


def expanded(name: str) -> Path:
    """The path that a name stands for, `~` written out.

    Raises:
        DataError: of somebody who has no home here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"'{name}': {error}; write the path out") from error


def mode_of(path: Path) -> int | None:
    """Type bits of the file or folder that a path leads to, or None where there is none.

    Raises:
        DataError: a link that leads nowhere, a path that cannot be looked at, a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise DataError(
                f"{path} is a link to '{os.readlink(path)}', which does not exist; fetch it, or mend the link"
            ) from error
        return None
    except OSError as error:  # a circle of links, a name too long, a folder that may not be entered
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check the path, or give another"
        ) from error
    except ValueError as error:
        raise DataError(f"{str(path)!r} is no path ({error})") from error
    if stat.S_IFMT(mode) in SPECIAL:
        raise DataError(f"{path} is {SPECIAL[stat.S_IFMT(mode)]}, not a file; write the text to a file first")
    return mode


def _folder_files(folder: Path) -> list[Path]:
    found: dict[str, list[Path]] = {}
    notes: list[Path] = []
    others: list[Path] = []
    for path in _walk(folder):
        kind = readers.kind(path)
        if kind is None or readers.suffix(path) in readers.NOTES:
            (others if kind is None else notes).append(path)
            continue
        found.setdefault(kind, []).append(path)
        if len(found) > 1:
            raise DataError(
                f"folder {folder} holds files of several kinds ({', '.join(sorted(found))}), and which of "
                f"them are the text is not for guessing; give a glob such as '{folder / f'*.{min(found)}'}'"
            )
    if not found and not notes:
        raise DataError(
            f"folder {folder} holds no parquet, JSONL, JSON, txt or md file; give another data source"
        )
    left_out = [*notes, *others] if found else others
    if left_out:
        endings = sorted({path.suffix or path.name for path in left_out})
        glob_of = f"; '{folder}/**/*{notes[0].suffix}' reads those" if found and notes else ""
        _tell(f"folder {folder}: left out {len(left_out)} files ({', '.join(endings[:5])}){glob_of}")
    files = sorted(next(iter(found.values()), notes))
    for path in files:
        mode_of(path)
    return files


@cache
def _tell(sentence: str) -> None:
    """Once a process: a folder is looked at by every stage, and by the key under which its text is kept."""
    log.info(sentence)


def _walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those inside it, hidden ones left out; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be listed ({error.strerror}); give a folder that can be read, or a glob"
        ) from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _nearby(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (nor is there {path.parent})"
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean '{path.parent / near[0]}'?" if near else f" (seen from {Path.cwd()})"
