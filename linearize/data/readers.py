"""Local files to rows: parquet, JSONL, JSON and plain text; compressed JSON and text too.

pyarrow and the standard library read them, not `datasets.load_dataset`: that would copy every file into the
user's cache as Arrow (several times its size) before the first row. Parquet is read one row group at a time,
only the columns needed. Every row comes with its place in the file ("line 7"), for messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from linearize.data.document import Row
from linearize.data.encoding import COMPRESSED, lines, unreadable, whole
from linearize.errors import DataError

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".markdown": "txt",
    ".rst": "txt",
}

NOTES = (".md", ".markdown", ".rst")
"""Text that stands beside data as often as it is data (a README): of a folder these are read where nothing else is."""

Rows = Iterator[tuple[str, Row]]
"""(place, row) one by one."""


def suffix(path: Path) -> str:
    """What a file's name says that it holds, compressed or not: ".jsonl" of both text.jsonl and text.jsonl.gz."""
    suffixes = [part.lower() for part in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def kind(path: Path) -> str | None:
    """parquet, jsonl, json, txt, or None for a file that is not read."""
    found = KINDS.get(suffix(path))
    return None if found == "parquet" and path.suffix.lower() in COMPRESSED else found


def parquet_columns(path: Path) -> tuple[list[str], list[int]]:
    """Column names, and the number of the first row of each row group, from 1.

    Raises:
        DataError: not a whole parquet file.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            names = list(file.schema_arrow.names)
    except _parquet_failures() as error:
        raise unreadable(path, "parquet", error) from error
    return names, [1 + sum(sizes[:group]) for group in range(len(sizes))]


def read_parquet(path: Path, group: int, first: int, columns: Sequence[str]) -> Rows:
    """The rows of one row group. Raises DataError as `parquet_columns`."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(group, columns=list(columns))
        for batch in table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield f"row {first}", row
                first += 1
    except _parquet_failures() as error:
        raise unreadable(path, "parquet", error) from error


def _parquet_failures() -> tuple[type[Exception], ...]:
    """pyarrow's own errors, and what values raise that are not what the file says (bytes that are no text)."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, OverflowError)


def read_jsonl(path: Path) -> Rows:
    """One JSON object a line; empty lines are passed over.

    Raises:
        DataError: names the file and the line that is not an object.
    """
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            yield f"line {number}", _row(path, number, line)


def read_json(path: Path) -> Rows:
    """A JSON array of objects or strings, an object with one such array in it, or JSONL under the wrong name.

    Raises:
        DataError: anything else.
    """
    if _holds_json_lines(path):
        yield from read_jsonl(path)
        return
    content = whole(path)
    if not content.strip():
        return
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, "JSON", error) from error
    if isinstance(rows, dict):
        arrays = [value for value in rows.values() if isinstance(value, list)]
        rows = arrays[0] if len(arrays) == 1 else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, (dict, str)) for row in rows):
        raise DataError(
            f"{path} must hold a JSON array of objects (or of strings); write one object a line to a .jsonl "
            "file"
        )
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row if isinstance(row, dict) else {"text": row}


def read_txt(path: Path) -> Rows:
    """The whole file as one document: a book's paragraphs belong together. Short texts are for JSONL."""
    yield "line 1", {"text": whole(path)}


READERS = {"jsonl": read_jsonl, "json": read_json, "txt": read_txt}


def _holds_json_lines(path: Path) -> bool:
    """Whether the first of several lines is a whole JSON value."""
    filled = (line for line in lines(path) if line.strip())
    first = next(filled, "")
    if next(filled, None) is None:
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of too many digits, or too many brackets
        raise DataError(f"{path}, line {number}: not JSON ({error}); mend or delete the line") from error
    if not isinstance(row, dict):
        raise DataError(
            f'{path}, line {number}: must be an object such as {{"text": "..."}}, not {type(row).__name__}'
        )
    return row
