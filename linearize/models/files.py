"""Files of a checkpoint folder: what stands under a name, and JSON that may be anything."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PureWindowsPath
from typing import Any

from linearize.errors import CheckpointError

MAX_JSON = 200_000_000
"""Bytes; the largest indices and vocabularies have a tenth of it."""

FOLDER = "a folder"
KINDS = (
    (stat.S_ISDIR, FOLDER),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
SPECIAL = ("a pipe", "a socket", "a device")


def instead_of_file(path: Path) -> str | None:
    """What stands where a file is expected ("a folder", "a pipe", ...); None for a file and for nothing at all."""
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        return "out of reach (no permission)"
    except (OSError, ValueError):
        return "a symbolic link that leads nowhere or in a circle" if os.path.islink(path) else None
    return next((kind for matches, kind in KINDS if matches(mode)), None)


def check_file(path: Path, remedy: str) -> None:
    """Refuse what is no file where one is expected; nothing at all passes.

    Raises:
        CheckpointError: says what is there; ends with the remedy.
    """
    found = instead_of_file(path)
    if found:
        raise CheckpointError(f"{path} is {found} and not a file; {remedy}")


def check_files(folder: Path) -> None:
    """Refuse a folder that holds what a library would wait at for ever, or read without end.

    Raises:
        CheckpointError: names the first such thing.
    """
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and instead_of_file(path) in SPECIAL:
            check_file(path, "fetch the checkpoint again")


def leads_out(name: str) -> bool:
    """Whether a name that stands in a checkpoint's file is of something outside the folder, on any system."""
    return bool(PureWindowsPath(name).anchor) or name.startswith("/") or ".." in re.split(r"[/\\\\]", name)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        CheckpointError: no file (a pipe would be waited at for ever), not readable, not JSON, too large or too deep to
            be meant, or not a mapping.
    """
    check_file(path, "fetch the checkpoint again")
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(
                f"{path} has {size:,} bytes, too many for its kind; fetch the checkpoint again"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(
            f"{path} is nested too deeply to be a checkpoint's; fetch the checkpoint again"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a mapping; fetch the checkpoint again"
        )
    return content


def read_words(path: Path, remedy: str) -> str:
    """The text of a file that people may have written themselves.

    Raises:
        CheckpointError: no file, not readable, or no text in UTF-8; ends with the remedy.
    """
    check_file(path, remedy)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no text in UTF-8 (byte {error.start:,}); {remedy}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
