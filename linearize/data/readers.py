"""Local files to rows: parquet, JSONL, JSON and plain text; compressed JSONL and text too.

pyarrow and the standard library read them, not `datasets.load_dataset`: that would copy every file into the
user's cache as Arrow (several times its size) before the first row. Parquet is read one row group at a time,
only the columns needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from linearize.data.document import Row
from linearize.errors import DataError

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".text": "txt",
}
COMPRESSED = (".gz", ".bz2", ".zst")


def kind(path: Path) -> str | None:
    """parquet, jsonl, json, txt, or None for a file that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED:
        inner = KINDS.get(suffixes[-2])
        return inner if inner in ("jsonl", "txt") else None
    return KINDS.get(suffixes[-1]) if suffixes else None


def parquet_columns(path: Path) -> tuple[list[str], int]:
    """Column names and number of row groups.

    Raises:
        DataError: not a whole parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow.names, file.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "parquet", error) from error


def read_parquet(path: Path, group: int, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of one row group. Raises DataError as `parquet_columns`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(group, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "parquet", error) from error
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line; empty lines are passed over.

    Raises:
        DataError: names the file and the line that is not an object.
    """
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _row(path, number, line)


def read_json(path: Path) -> Iterator[Row]:
    """A JSON array of objects or strings, an object with one such array in it, or JSONL under the wrong name.

    Raises:
        DataError: anything else.
    """
    content = "".join(_lines(path))
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        if "\n" in content.strip() and error.msg == "Extra data":
            yield from read_jsonl(path)
            return
        raise _unreadable(path, "JSON", error) from error
    if isinstance(rows, dict):
        arrays = [value for value in rows.values() if isinstance(value, list)]
        rows = arrays[0] if len(arrays) == 1 else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, (dict, str)) for row in rows):
        raise DataError(
            f"{path} must hold a JSON array of objects (or of strings); write one object a line to a .jsonl "
            "file"
        )
    for row in rows:
        yield row if isinstance(row, dict) else {"text": row}


def read_txt(path: Path) -> Iterator[Row]:
    """The whole file as one document: a book's paragraphs belong together. Short texts are for JSONL."""
    yield {"text": "".join(_lines(path))}


READERS = {"jsonl": read_jsonl, "json": read_json, "txt": read_txt}


def _lines(path: Path) -> Iterator[str]:
    import pyarrow as pa

    try:
        if path.suffix.lower() in COMPRESSED:
            with pa.input_stream(str(path), compression="detect") as stream:
                yield from stream.read().decode("utf-8").splitlines(keepends=True)
        else:
            with path.open(encoding="utf-8") as file:
                yield from file
    except (UnicodeDecodeError, OSError, pa.ArrowException) as error:
        raise _unreadable(path, "UTF-8 text", error) from error


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); mend or delete the line") from error
    if not isinstance(row, dict):
        raise DataError(
            f'{path}, line {number}: must be an object such as {{"text": "..."}}, not {type(row).__name__}'
        )
    return row


def _unreadable(path: Path, what: str, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as {what} ({error}); check the file, or fetch it again")
