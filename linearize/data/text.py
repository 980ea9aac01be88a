"""Text sources to documents: what a recipe's `data.source` and `data.validation` may name, and in what order."""

from __future__ import annotations

import difflib
import glob
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linearize.data import builtin, hub, readers
from linearize.data.document import Document, Row
from linearize.data.instruct import Template
from linearize.errors import DataError

log = logging.getLogger(__name__)

POOL = 100_000_000
"""Characters of local text shuffled at a time: everything below this size is shuffled as one."""

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Shard:
    """A piece of a source that can be read on its own: a row group, a file."""

    where: str
    rows: Callable[[], Iterator[Row]]
    template: Template


def load_texts(
    source: str | Sequence[str],
    *,
    split: str = "train",
    text_field: str = "text",
    template: str = "none",
    tokenizer: Any = None,
    seed: int | None = None,
) -> Iterator[Document]:
    """The documents of a source, read as they are asked for.

    Args:
        source: ``builtin`` (the sample inside the package); a parquet, JSONL, JSON or txt file (a txt file is
            one document); a folder of files of one of these kinds; a glob; a hub dataset, ``owner/name`` or
            ``owner/name:config``, which is streamed; or a list of these.
        split: of the sample and of hub datasets.
        text_field: the column that holds the text.
        template: none, alpaca or chat; see `Template`. The sample and txt files are always plain text.
        tokenizer: needed by the chat template.
        seed: None reads in order; a number shuffles: local text within pools of 100 M characters (so most
            corpora as a whole), a hub dataset within its own buffer. Local text and hub datasets take turns,
            a document each.

    Raises:
        DataError: at once for what is missing, unreadable or without the column; while reading for bad rows;
            at the end where there was no text at all.
    """
    names = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    if not names or not all(isinstance(name, (str, Path)) and str(name) for name in names):
        raise DataError(
            f"data source {source!r} must be a name or a list of names: builtin, a file, folder, glob or "
            "hub dataset"
        )
    shape = Template(template, text_field, tokenizer)
    shards: list[Shard] = []
    streams: list[Iterator[Document]] = []
    for name in map(str, names):
        if name == builtin.NAME:
            shards += _file_shards(builtin.sample(split), Template("none", "text"))
        elif (paths := _local_files(name)) is not None:
            shards += [shard for path in paths for shard in _file_shards(path, shape)]
        else:
            streams.append(
                _documents(Shard(f"hub dataset '{name}'", _hub_rows(name, split, seed, shape), shape))
            )
    local = [
        _shuffled(shards, seed) if seed is not None else (d for shard in shards for d in _documents(shard))
    ]
    return _some([*(local if shards else []), *streams], ", ".join(map(str, names)))


def _some(streams: list[Iterator[Document]], what: str) -> Iterator[Document]:
    """The streams in turn; refuses to end without a single document."""
    count = 0
    while streams:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                count += 1
                yield document
    if not count:
        raise DataError(
            f"{what}: there is no text in it (no rows, or only empty ones); give another data source"
        )


def _documents(shard: Shard) -> Iterator[Document]:
    for row in shard.rows():
        document = shard.template.document(row, shard.where)
        if document is not None:
            yield document


def _shuffled(shards: list[Shard], seed: int) -> Iterator[Document]:
    """Shards in random order, their documents in random order within pools of `POOL` characters."""
    rng = np.random.default_rng(seed)
    pool: list[Document] = []
    size = 0
    for index in rng.permutation(len(shards)):
        for document in _documents(shards[index]):
            pool.append(document)
            size += len(document.text)
            if size >= POOL:
                yield from (pool[i] for i in rng.permutation(len(pool)))
                pool, size = [], 0
    yield from (pool[i] for i in rng.permutation(len(pool)))


def _file_shards(path: Path, template: Template) -> list[Shard]:
    kind = readers.kind(path)
    if kind is None:
        raise DataError(f"{path}: files of this kind are not read; give parquet, JSONL, JSON or txt")
    if kind == "txt":
        return [Shard(str(path), lambda: readers.read_txt(path), Template("none", "text"))]
    if kind != "parquet":
        first = next(readers.READERS[kind](path), None)
        if first is not None:
            template.columns(first, str(path))  # a wrong column is told now, not when the model is loaded
        return [Shard(str(path), lambda: readers.READERS[kind](path), template)]
    names, groups = readers.parquet_columns(path)
    columns = template.columns(names, str(path))
    return [Shard(str(path), _group_reader(path, group, columns), template) for group in range(groups)]


def _group_reader(path: Path, group: int, columns: list[str]) -> Callable[[], Iterator[Row]]:
    return lambda: readers.read_parquet(path, group, columns)


def _hub_rows(name: str, split: str, seed: int | None, template: Template) -> Callable[[], Iterator[Row]]:
    stream, columns = hub.open_stream(name, split=split, seed=seed)
    if columns is not None:
        template.columns(columns, f"hub dataset '{name}'")
    return lambda: hub.rows(stream, name)


def _local_files(name: str) -> list[Path] | None:
    """The files a name stands for on this machine; None where it can only be a hub dataset."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder_files(path)
    if any(mark in name for mark in "*?["):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in found if match.is_file()]
        if not files:
            raise DataError(
                f"no file matches '{name}' (seen from {Path.cwd()}); check the pattern, and quote it in a "
                "shell"
            )
        return files
    if not HUB_NAME.fullmatch(name) or readers.kind(path) or name.startswith(("./", "../", "/", "~")):
        raise DataError(
            f"data source '{name}' does not exist: there is no such file or folder{_nearby(path)}"
        )
    if "/" in name and "did you mean" in _nearby(path):  # a misspelt file, though it could be a hub name
        raise DataError(
            f"data source '{name}' does not exist: there is no such file or folder{_nearby(path)}"
        )
    if difflib.get_close_matches(name, [builtin.NAME], cutoff=0.6):
        raise DataError(f"unknown data source '{name}': did you mean '{builtin.NAME}'?")
    return None


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder))
    )
    by_kind: dict[str, list[Path]] = {}
    for path in files:
        kind = readers.kind(path)
        if kind is not None:
            by_kind.setdefault(kind, []).append(path)
    if not by_kind:
        raise DataError(
            f"folder {folder} holds no parquet, JSONL, JSON or txt file; give another data source"
        )
    if len(by_kind) > 1:
        raise DataError(
            f"folder {folder} holds files of several kinds ({', '.join(sorted(by_kind))}), and which of "
            f"them are the text is not for guessing; give a glob such as '{folder}/*.{min(by_kind)}'"
        )
    return next(iter(by_kind.values()))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _nearby(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (nor is there {path.parent})"
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean '{path.parent / near[0]}'?" if near else f" (seen from {Path.cwd()})"
