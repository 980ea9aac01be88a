"""Sampled text on disk: one folder a teacher and setting, one parquet file a round, each there whole or not at all.

The folder under `cache_dir()/sampled` may be deleted at any time, and goes on where it ended: a part is a function of
the settings, its number and the parts before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from linearize.errors import CheckpointError
from linearize.models.cache import cache_dir
from linearize.sample.openings import FILE
from linearize.storing import remove

log = logging.getLogger(__name__)

FORMAT = 2
"""Goes up with any change of what the same settings write."""
ABOUT = "about.json"
REASONS = ("short", "loop", "duplicate")
"""Why a document is dropped."""
_META, _DIGEST = b"linearize", b"digest"
_SCHEMA = pa.schema(
    [("text", pa.string()), ("source", pa.string()), ("tokens", pa.int32()), ("beginning", pa.int64())]
)


@dataclass
class Counts:
    """Documents and tokens, by what became of them: kept, short, loop, duplicate; and how many of the kept ended."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("kept", *REASONS), 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("kept", *REASONS), 0))
    ended: int = 0
    """Kept documents that the teacher ended; the others were cut."""

    def add(self, verdict: str | None, tokens: int, *, ended: bool) -> None:
        """Count a document."""
        what = verdict or "kept"
        self.documents[what] += 1
        self.tokens[what] += tokens
        self.ended += ended and verdict is None

    def include(self, other: Counts) -> None:
        """Count all that another has counted."""
        for mine, theirs in ((self.documents, other.documents), (self.tokens, other.tokens)):
            for what, number in theirs.items():
                mine[what] += number
        self.ended += other.ended


@dataclass
class Part:
    """A round's kept documents.

    Attributes:
        texts, sources, tokens, beginnings: one entry a document.
        counts: of all that the round wrote.
    """

    texts: list[str]
    sources: list[str]
    tokens: list[int]
    beginnings: list[int]
    counts: Counts


class Store:
    """The folder of one teacher and setting.

    Args:
        key: of `key_of`.
    """

    def __init__(self, key: str) -> None:
        self.folder = cache_dir() / "sampled" / key

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out inside the block; waits for one that is in it.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("waiting for another process that samples into %s", self.folder)
                lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            for leftover in self.folder.glob("*.partial"):
                remove(leftover)
            yield
        finally:
            lock.release()

    def part(self, number: int) -> Path:
        """File of a round, numbered from 0."""
        return self.folder / f"part-{number:05d}.parquet"

    def read(self, number: int) -> tuple[Counts, list[int]] | None:
        """What a part counted, and the beginnings of its documents; None where it is not there, or damaged.

        All of it is read: parquet finds few of the bits that a disk or a copy has turned, and the rest is another text.
        """
        path = self.part(number)
        if not path.is_file():
            return None
        try:
            table = pq.ParquetFile(path).read()
            columns = [table[name].to_pylist() for name in _SCHEMA.names]
            meta = table.schema.metadata
            counts = _counts(json.loads(meta[_META]))
            # parts from before there was one have none
            if meta.get(_DIGEST, (digest := _digest(columns, counts))) != digest:
                raise ValueError("its contents are not those that were written")
            return counts, columns[-1]
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ):
            log.warning("%s is damaged: it is sampled again", path)
            return None

    def write(self, number: int, part: Part) -> Path:
        """Put a part in its place, at once. Raises CheckpointError."""
        path = self.part(number)
        columns: list[list[Any]] = [part.texts, part.sources, part.tokens, part.beginnings]
        meta = {_META: json.dumps(asdict(part.counts)).encode(), _DIGEST: _digest(columns, part.counts)}
        table = pa.Table.from_arrays(
            [pa.array(values, type=kind.type) for values, kind in zip(columns, _SCHEMA, strict=True)],
            schema=_SCHEMA.with_metadata(meta),
        )
        partial = path.with_suffix(".partial")
        try:
            pq.write_table(table, partial, compression="zstd")
            self._into_place(partial, path)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            remove(partial)
        return path

    def about(self) -> dict[str, Any]:
        """What an earlier call has written beside the parts (batch, steps, device, settings), or nothing."""
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        return {}

    def describe(self, about: dict[str, Any]) -> None:
        """Write what is said of all parts. Raises CheckpointError."""
        partial = self.folder / f"{ABOUT}.partial"
        try:
            partial.write_text(json.dumps(about, indent=1), encoding="utf-8")
            self._into_place(partial, self.folder / ABOUT)
        except OSError as error:
            raise self._unwritable(error) from error

    def _into_place(self, partial: Path, path: Path) -> None:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def _unwritable(self, error: OSError) -> CheckpointError:
        reason = getattr(error, "strerror", None) or error
        return CheckpointError(
            f"cannot write sampled text into {self.folder}: {reason}; free some space or set LINEARIZE_CACHE to a "
            "folder on another disk, and give the command again: finished parts are kept"
        )


def _digest(columns: list[list[Any]], counts: Counts) -> bytes:
    """One number for a part's contents."""
    return hashlib.sha256(json.dumps([columns, asdict(counts)]).encode()).hexdigest().encode()


def _counts(found: dict[str, Any]) -> Counts:
    """Counts as a part says them; raises LookupError, ValueError, TypeError or AttributeError else."""
    counts, like = Counts(found["documents"], found["tokens"], found["ended"]), Counts()
    for mine, theirs in ((counts.documents, like.documents), (counts.tokens, like.tokens)):
        if mine.keys() != theirs.keys() or not all(type(x) is int and x >= 0 for x in mine.values()):
            raise ValueError(f"counts {mine}")
    if type(counts.ended) is not int:
        raise ValueError(f"counts {counts.ended!r}")
    return counts


def key_of(teacher: dict[str, str], settings: dict[str, Any]) -> str:
    """A name for what decides the text: the teacher's files, the settings, the openings."""
    openings = hashlib.sha256(FILE.read_bytes()).hexdigest()
    parts = json.dumps([FORMAT, teacher, settings, openings], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]
