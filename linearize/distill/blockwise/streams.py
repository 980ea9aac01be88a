"""Residual streams on the disk: raw arrays that are mapped into memory, each with a manifest that holds its checksums.

A stream is `NAME.bin`, rows one after the other in the stream's own dtype, and, once it is whole, `NAME.json` with its
layout, where it comes from and the SHA-256 of every chunk of rows. While it is written `NAME.progress` has a line for
every chunk that the disk has, so that a writer that was killed goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linearize import storing
from linearize.errors import CheckpointError
from linearize.progress import Meter

FORMAT = 1
CHUNK = 2**26
"""Bytes of a chunk, about; one row at least."""


@dataclass(frozen=True)
class Layout:
    """Shape of a stream: `rows` sequences of `tokens` vectors of `width` numbers of torch's `dtype`, in chunks."""

    rows: int
    tokens: int
    width: int
    dtype: str
    chunk: int

    @classmethod
    def of(cls, rows: int, tokens: int, width: int, dtype: torch.dtype, batch: int) -> Layout:
        """With chunks of whole batches of `batch` rows."""
        row = tokens * width * dtype.itemsize
        chunk = max(1, CHUNK // (row * batch)) * batch
        return cls(rows, tokens, width, str(dtype).removeprefix("torch."), min(chunk, rows))

    @property
    def row(self) -> int:
        """Bytes of a sequence."""
        return self.tokens * self.width * self.kind.itemsize

    @property
    def size(self) -> int:
        """Bytes of the stream."""
        return self.rows * self.row

    @property
    def kind(self) -> torch.dtype:
        """Torch's dtype."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def chunks(self) -> list[range]:
        """The rows of each chunk."""
        return [range(n, min(n + self.chunk, self.rows)) for n in range(0, self.rows, self.chunk)]


class Writer:
    """Writes a stream, or goes on writing it.

    Args:
        folder, name: of the stream.
        layout: its shape.
        source: what decides its numbers; one that was begun of something else is begun anew.

    Attributes:
        done: chunks that are there, from the first.

    Raises:
        CheckpointError: the disk is full or refuses; also of what writes.
    """

    def __init__(self, folder: Path, name: str, layout: Layout, source: dict[str, Any]) -> None:
        self.path, self.layout = folder / f"{name}.bin", layout
        self.manifest, self._progress = _manifest(folder, name), folder / f"{name}.progress"
        self._head = {"format": FORMAT, "layout": asdict(layout), "source": source}
        self._sums: list[str] = self._begun()
        if not self._sums:
            with _written(self.path), self.path.open("wb") as file:
                file.truncate(layout.size)
        # without a line that was cut off, behind which the next one would stand
        storing.write_file(self._progress, "".join(f"{x}\n" for x in [json.dumps(self._head), *self._sums]))

    @property
    def done(self) -> int:
        return len(self._sums)

    def put(self, values: Tensor) -> None:
        """Write the next chunk's rows [R, T, width]."""
        rows = self.layout.chunks[self.done]
        assert values.shape == (len(rows), self.layout.tokens, self.layout.width), values.shape
        assert values.dtype == self.layout.kind, values.dtype
        raw = _bytes(values)
        digest = hashlib.sha256(raw).hexdigest()
        with _written(self.path):
            with self.path.open("r+b") as file:
                file.seek(rows[0] * self.layout.row)
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            with self._progress.open("a", encoding="utf-8") as lines:
                lines.write(digest + "\n")
                lines.flush()
                os.fsync(lines.fileno())
        self._sums.append(digest)

    def finish(self) -> None:
        """Say that the stream is whole."""
        assert self.done == len(self.layout.chunks)
        storing.write_json(self.manifest, {**self._head, "sha256": self._sums})
        storing.remove(self._progress)

    def _begun(self) -> list[str]:
        """Checksums of the chunks that an earlier process has written, the last one read again."""
        try:
            head, *sums = self._progress.read_text(encoding="utf-8").split("\n")
            sums = sums[:-1]  # behind the last line's end, or a line that was cut off
            if json.loads(head) != self._head or self.path.stat().st_size != self.layout.size:
                return []
            chunks = self.layout.chunks[: len(sums)]
            if sums and hashlib.sha256(_read(self.path, self.layout, chunks[-1])).hexdigest() != sums[-1]:
                sums = sums[:-1]
        except (OSError, ValueError, IndexError):
            return []
        return sums


class Stream:
    """A whole stream.

    Args:
        folder, name: of it.
        layout, source: what it has to be of.

    Raises:
        CheckpointError: it is not whole, was cut short, or is another one; names what differs.
    """

    def __init__(self, folder: Path, name: str, layout: Layout, source: dict[str, Any]) -> None:
        self.path, self.layout = folder / f"{name}.bin", layout
        self.manifest = _manifest(folder, name)
        self._again = f"Delete {self.manifest} and give linearize blocks write again"
        said = storing.read_json(self.manifest, self._again)
        if said.get("format") != FORMAT or said.get("layout") != asdict(layout):
            raise CheckpointError(f"{self.manifest}: is of another shape than this recipe's. {self._again}")
        differing = differences(said.get("source"), source)
        if differing:
            raise CheckpointError(
                f"{self.manifest}: is of {', '.join(differing)} than this run's. {self._again}"
            )
        sums = said.get("sha256")
        self._sums: list[str] = sums if isinstance(sums, list) else []
        if len(self._sums) != len(layout.chunks):
            raise CheckpointError(
                f"{self.manifest}: its checksums are not those of its chunks. {self._again}"
            )
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != layout.size:
            raise CheckpointError(
                f"{self.path}: is truncated: it has {size:,} bytes of {layout.size:,}. {self._again}"
            )
        self._rows: Any = None

    def chunk(self, number: int) -> Tensor:
        """Rows [R, T, width] of a chunk, held against their checksum.

        Raises:
            CheckpointError: they are not what was written.
        """
        rows = self.layout.chunks[number]
        raw = _read(self.path, self.layout, rows)
        if hashlib.sha256(raw).hexdigest() != self._sums[number]:
            raise CheckpointError(
                f"{self.path}: rows {rows[0]} to {rows[-1]} are not what was written (another checksum). "
                f"{self._again}"
            )
        flat = torch.frombuffer(raw, dtype=self.layout.kind)
        return flat.view(len(rows), self.layout.tokens, self.layout.width)

    def check(self, title: str) -> None:
        """Read all of it once.

        Raises:
            CheckpointError: see `chunk`.
        """
        with Meter(title, self.layout.rows * self.layout.tokens) as meter:
            for number, rows in enumerate(self.layout.chunks):
                self.chunk(number)
                meter.advance(len(rows) * self.layout.tokens)

    def row(self, index: int) -> Tensor:
        """A sequence's vectors [T, width]."""
        if self._rows is None:
            self._rows = np.memmap(
                self.path, dtype=np.uint8, mode="r", shape=(self.layout.rows, self.layout.row)
            )
        flat = torch.from_numpy(np.array(self._rows[index])).view(self.layout.kind)
        return flat.view(self.layout.tokens, self.layout.width)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # a data loader's process maps it for itself


def is_whole(folder: Path, name: str) -> bool:
    """Whether a stream has been written to its end."""
    return _manifest(folder, name).is_file()


def taken(folder: Path, name: str) -> int:
    """Bytes of the disk that a stream has already, whole or not."""
    try:
        return (folder / f"{name}.bin").stat().st_blocks * 512
    except OSError:
        return 0


def remove(folder: Path, name: str) -> None:
    """Delete a stream; its manifest first, so that half of it is never taken for a whole one."""
    for ending in ("json", "progress", "bin"):
        storing.remove(folder / f"{name}.{ending}")


def differences(said: Any, now: dict[str, Any]) -> list[str]:
    """In words, which of the things that decide a stream's numbers are others."""
    said = said if isinstance(said, dict) else {}
    return [f"another {key}" for key in now if said.get(key) != now[key]]


def _manifest(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _bytes(values: Tensor) -> bytes:
    flat: Any = values.detach().cpu().contiguous().view(torch.uint8).numpy()
    raw: bytes = flat.tobytes()
    return raw


def _read(path: Path, layout: Layout, rows: range) -> bytearray:
    raw = bytearray(len(rows) * layout.row)
    try:
        with path.open("rb") as file:
            file.seek(rows[0] * layout.row)
            count = file.readinto(raw)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if count != len(raw):
        raise CheckpointError(f"{path}: is truncated: rows {rows[0]} to {rows[-1]} are not there")
    return raw


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Inside, what the system refuses is an error that a user can mend."""
    try:
        yield
    except OSError as error:
        raise storing.could_not_write(path, error) from error
