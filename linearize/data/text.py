"""Text sources to documents: what a recipe's `data.source` and `data.validation` may name, and in what order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linearize.data import builtin, encoding, hub, readers
from linearize.data.document import Document
from linearize.data.files import local_files
from linearize.data.instruct import Template
from linearize.errors import DataError, LinearizeError, collected, raise_together

log = logging.getLogger(__name__)

POOL = 100_000_000
"""Characters of local text shuffled at a time: everything below this size is shuffled as one."""


@dataclass(frozen=True)
class Shard:
    """A piece of a source that can be read on its own: a row group, a file."""

    where: str
    rows: Callable[[], readers.Rows]
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
        source: ``builtin`` (the sample inside the package); a parquet, JSONL, JSON, txt or md file (a txt or md
            file is one document); a folder of files of one of these kinds; a glob; a hub dataset, ``owner/name`` or
            ``owner/name:config``, which is streamed; or a list of these.
        split: of the sample and of hub datasets. Local files have none, so it stays "train" or "validation" for them.
        text_field: the column that holds the text.
        template: see `Template`. For parquet, JSON and hub datasets: the sample and txt files are always text.
        tokenizer: needed by the chat template.
        seed: None reads in order; a number shuffles: local text within pools of 100 M characters (so most
            corpora as a whole), a hub dataset within its own buffer. Local text and hub datasets take turns,
            a document each.

    Raises:
        DataError: at once for what is missing, unreadable or without the column, and for options that nothing in
            the source would follow; while reading for bad rows; at the end where there was no text at all.
    """
    names = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    if not names or not all(isinstance(name, (str, Path)) and str(name) for name in names):
        raise DataError(
            f"data source {source!r} must be a name or a list of names: builtin, a file, folder, glob or "
            "hub dataset"
        )
    shape = Template(template, text_field, tokenizer)
    if all(name == builtin.NAME for name in names):
        builtin.check(template, text_field)
    shards: list[Shard] = []
    streams: list[Iterator[Document]] = []
    errors: list[LinearizeError] = []
    for name in map(str, names):
        with collected(errors):
            if name == builtin.NAME:
                kind = builtin.PAIRS if template == "preference" else builtin.TEMPLATE
                sample = Template(kind, builtin.COLUMN)
                shards += _file_shards(builtin.sample(split), sample)
            elif (paths := local_files(name)) is not None:
                shards += [shard for path in paths for shard in _file_shards(path, shape)]
            elif not errors:  # nothing is asked of the hub for a list that is refused
                streams.append(
                    _documents(Shard(f"hub dataset '{name}'", _hub_rows(name, split, seed, shape), shape))
                )
    raise_together(errors, "data source")
    if not streams and split not in builtin.SPLITS:
        raise DataError(
            f"data.split: '{split}' is for hub datasets, and {', '.join(map(str, names))} is local; leave it out, and "
            "name the file of that split"
        )
    plain = not streams and not any(shard.template is shape for shard in shards)
    if (
        plain and shape.is_changed and split != "validation"
    ):  # held-out text need not have the training text's form
        log.warning(
            "%s is plain text: data.template and data.text_field do not apply", ", ".join(map(str, names))
        )
    local = [
        _shuffled(shards, seed) if seed is not None else (d for shard in shards for d in _documents(shard))
    ]
    return _some([*(local if shards else []), *streams], ", ".join(map(str, names)), shape)


def _some(streams: list[Iterator[Document]], what: str, shape: Template) -> Iterator[Document]:
    """The streams in turn; refuses to end without a single document, and tells at the end how many rows had none."""
    count, before = 0, shape.passed
    try:
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
                f"{what}: there is no text in it (no rows, or only such as hold no {shape.wants}); give another data "
                "source"
            )
    finally:  # also where the reader has enough
        if count and shape.passed > before and shape.answers:
            log.warning(
                "%s: rows that hold no %s are passed over, %s of them; mend them or take them out",
                what,
                shape.wants,
                f"{shape.passed - before:,}",
            )


def _documents(shard: Shard) -> Iterator[Document]:
    for place, row in shard.rows():
        try:
            document = shard.template.document(row, shard.where)
        except DataError as error:
            raise DataError(f"{error} ({place})") from error
        if document is None:
            shard.template.passed += 1
        else:
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
        raise DataError(
            f"{path}: files of this kind are not read; give parquet, JSONL, JSON, txt or md (all but parquet also "
            f"compressed: {', '.join(encoding.COMPRESSED)})"
        )
    if kind == "txt":
        plain = Template("rendered" if template.name == "rendered" else "none", "text")
        return [Shard(str(path), lambda: readers.read_txt(path), plain)]
    if kind != "parquet":
        first = next(readers.READERS[kind](path), None)
        if first is not None:
            template.columns(first[1], str(path))  # a wrong column is told now, not when the model is loaded
        return [Shard(str(path), lambda: readers.READERS[kind](path), template)]
    names, groups = readers.parquet_columns(path)
    columns = template.columns(names, str(path))
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise DataError(
            f"{path} has {names.count(twice[0])} columns '{twice[0]}', and which of them is meant is not for guessing; "
            "rename or drop one"
        )
    return [
        Shard(str(path), _group_reader(path, group, first, columns), template)
        for group, first in enumerate(groups)
    ]


def _group_reader(path: Path, group: int, first: int, columns: list[str]) -> Callable[[], readers.Rows]:
    return lambda: readers.read_parquet(path, group, first, columns)


def _hub_rows(name: str, split: str, seed: int | None, template: Template) -> Callable[[], readers.Rows]:
    stream, columns = hub.open_stream(name, split=split, seed=seed)
    if columns is not None:
        template.columns(columns, f"hub dataset '{name}'")
    return lambda: hub.rows(stream, name)
