"""A teacher's answers on the disk: its likeliest tokens at every place of a stage's text, computed before the stage.

The stage then trains without the teacher in memory and without its passes, as often as the text comes again. Files are
plain arrays that are mapped into memory; a marker with their sizes and checksums says that they are whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from linearize import storing
from linearize.distill import processes
from linearize.distill.identity import digest
from linearize.models.cache import sha256
from linearize.objectives import TopK
from linearize.progress import Meter

log = logging.getLogger(__name__)

FOLDER = "answers"
MARKER = "complete.json"
KEYS: dict[str, Any] = {"ids": np.int32, "log_probs": np.float32, "rest": np.float32}
"""File -> its numbers: [N, T, K] twice, [N, T]."""
TEXT = "text"
"""In the marker: checksum of what was answered."""
PREFIX = "teacher_"
"""Of their keys in a batch."""


def of_batch(batch: dict[str, Tensor]) -> TopK | None:
    """What a batch holds of a teacher, or None."""
    if f"{PREFIX}ids" not in batch:
        return None
    return TopK(*(batch[f"{PREFIX}{key}"] for key in KEYS))


class Answered(Dataset[dict[str, Tensor]]):
    """A data set whose items hold the teacher's answers too.

    Args:
        dataset: packed sequences.
        folder: with the answers to all of them.
        count: K.
    """

    def __init__(self, dataset: Any, folder: Path, count: int) -> None:
        self.dataset, self.folder = dataset, folder
        self._arrays = {
            key: np.memmap(folder / f"{key}.bin", dtype=KEYS[key], mode="r", shape=shape)
            for key, shape in _shapes(dataset, count).items()
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        found = {key: torch.from_numpy(np.array(array[index])) for key, array in self._arrays.items()}
        found["ids"] = found["ids"].long()
        return {**self.dataset[index], **{f"{PREFIX}{key}": value for key, value in found.items()}}


def remembered(
    dataset: Any,
    folder: Path,
    count: int,
    answer: Callable[[], Callable[[dict[str, Tensor]], TopK]],
    at_once: int,
) -> Answered:
    """The data set with the teacher's answers, which are computed where they are not in the folder yet.

    Sequences are shared out to the processes, as many to each, so that all of them step alike.

    Args:
        dataset: packed sequences.
        folder: of the stage.
        count: K.
        answer: called where something is to be computed; gives what answers a batch, tensors [B, T] on the CPU.
        at_once: B.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    place, shapes = folder / FOLDER, _shapes(dataset, count)
    mark = processes.alone(lambda: digest(dataset))
    if not processes.alone(lambda: _is_whole(place, shapes, mark)):
        size = sum(np.dtype(KEYS[key]).itemsize * int(np.prod(shape)) for key, shape in shapes.items())
        log.info("the teacher's %d likeliest tokens at every place: %.1f MB in %s", count, size / 1e6, place)
        processes.alone(lambda: _prepare(place, shapes))
        _compute(dataset, place, shapes, answer(), at_once)
        processes.alone(lambda: _mark(place, mark))
    return Answered(dataset, place, count)


def _compute(
    dataset: Any,
    place: Path,
    shapes: dict[str, tuple[int, ...]],
    answer: Callable[[dict[str, Tensor]], TopK],
    at_once: int,
) -> None:
    total, shares, rank = len(dataset), processes.count(), processes.rank()
    each = -(-total // shares)
    own = [
        min(rank * each + number, total - 1) for number in range(each)
    ]  # some twice where it does not divide
    with Meter("the teacher's answers", total * shapes["rest"][1]) as meter:
        for start in range(0, each, at_once):
            numbers = own[start : start + at_once]
            items = [dataset[number] for number in numbers]
            found = answer(
                {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}
            )
            processes.each(partial(_write, place, numbers, found))
            meter.advance(min(len(numbers) * shares, total) * shapes["rest"][1])


def _write(place: Path, numbers: list[int], found: TopK) -> None:
    """The answers to some sequences, at their places: written and not mapped, as other machines write beside them."""
    try:
        for key, kind in KEYS.items():
            values = getattr(found, key).cpu().numpy().astype(kind)
            with (place / f"{key}.bin").open("r+b") as file:
                for number, value in zip(numbers, values, strict=True):
                    file.seek(number * value.nbytes)
                    file.write(value.tobytes())
    except OSError as error:
        raise storing.could_not_write(place, error) from error


def _shapes(dataset: Any, count: int) -> dict[str, tuple[int, ...]]:
    tokens = len(dataset[0]["input_ids"])
    return {
        "ids": (len(dataset), tokens, count),
        "log_probs": (len(dataset), tokens, count),
        "rest": (len(dataset), tokens),
    }


def _prepare(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    storing.remove(folder)
    try:
        folder.mkdir(parents=True)
        for key, shape in shapes.items():
            with (folder / f"{key}.bin").open("wb") as file:
                file.truncate(np.dtype(KEYS[key]).itemsize * int(np.prod(shape)))
    except OSError as error:
        raise storing.could_not_write(folder, error) from error


def _mark(folder: Path, text: str) -> None:
    sums = {key: sha256(folder / f"{key}.bin") for key in KEYS}
    storing.write_json(folder / MARKER, {TEXT: text, **sums})


def _is_whole(folder: Path, shapes: dict[str, tuple[int, ...]], text: str) -> bool:
    """Whether all answers to this very text are there; read whole, as a checkpoint is."""
    try:
        said = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {key: np.dtype(KEYS[key]).itemsize * int(np.prod(shape)) for key, shape in shapes.items()}
        return said[TEXT] == text and all(
            (folder / f"{key}.bin").stat().st_size == sizes[key]
            and sha256(folder / f"{key}.bin") == said[key]
            for key in KEYS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
