"""Text files to lines: UTF-8 with or without a byte order mark, compressed or not, one form of line ends.

Lines end where files say so (a line feed, a carriage return, both), not at every character that Unicode calls a line
break: U+2028 is an ordinary character inside a JSON string. What is no UTF-8 is named, not guessed at.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from linearize.errors import DataError

COMPRESSED = (".gz", ".bz2", ".zst")

LONGEST = 1 << 29
"""Characters of one line, or of one text file, at most: what is longer was not meant as one text."""

HEAD = 4096
"""Bytes looked at to see what kind of file it is."""

MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte order marks; the longer ones first."""

CONTAINERS = {
    b"\x1f\x8b": "gzip: name it .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard: name it .zst",
    b"\xfd7zXZ": "xz: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
}
"""How files begin that hold text in another form."""


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, each with its line feed.

    Raises:
        DataError: it cannot be opened or unpacked, is no UTF-8, or a line is too long.
    """
    import pyarrow as pa

    number = 1
    try:
        with _binary(path) as binary:
            _check_head(path, binary.peek(HEAD)[:HEAD])
            with io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
                while line := file.readline(LONGEST):
                    if len(line) == LONGEST:
                        raise _too_long(f"{path}, line {number}")
                    yield line
                    number += 1
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} cannot be read as UTF-8 text (byte 0x{error.object[error.start]:02x} at or after line {number}); "
            "check the file, or convert it; Latin-1 or Windows-1252 by: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
        ) from error
    except (OSError, EOFError, pa.ArrowException) as error:
        raise unreadable(path, "UTF-8 text", error) from error


def whole(path: Path) -> str:
    """All of a text file. Raises DataError as `lines`, and where it is too long."""
    pieces: list[str] = []
    size = 0
    for line in lines(path):
        pieces.append(line)
        size += len(line)
        if size > LONGEST:
            raise _too_long(str(path))
    return "".join(pieces)


def unreadable(path: Path, what: str, error: Exception) -> DataError:
    """The message for a file that is damaged or not what its name says."""
    return DataError(f"{path} cannot be read as {what} ({error}); check the file, or fetch it again")


def _too_long(where: str) -> DataError:
    return DataError(
        f"{where}: more than {LONGEST:,} characters in one text; cut it up, or give JSONL, one object a line"
    )


def _binary(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    if path.suffix.lower() in COMPRESSED:
        return io.BufferedReader(cast(Any, pa.input_stream(str(path), compression="detect")))
    return path.open("rb")


def _check_head(path: Path, head: bytes) -> None:
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            raise DataError(
                f"{path} cannot be read as UTF-8 text (it begins with the byte order mark of {encoding}); check the "
                f"file, or convert it: iconv -f {encoding} -t UTF-8 OLD > NEW"
            )
    for magic, what in CONTAINERS.items():
        if head.startswith(magic):
            raise DataError(f"{path} cannot be read as UTF-8 text (it is {what}); check the file's name")
    if b"\0" in head:
        raise DataError(
            f"{path} cannot be read as UTF-8 text (it holds NUL bytes); check the file: it is binary, or UTF-16 "
            "without a byte order mark, which this converts: iconv -f UTF-16LE -t UTF-8 OLD > NEW"
        )
