"""Tensors of a sharded run on the disk: each process writes its own rows, and any number of processes reads them.

What one process writes as `trained.safetensors`, four write as `trained-1-of-4.safetensors` to `trained-4-of-4`: rows
of a sharded tensor one after the other, a process's own in its file, and whole ones in the first. Nothing is gathered,
and a process that reads takes the rows that it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from linearize import storing
from linearize.distill import processes, shards
from linearize.distill.trainable import trained
from linearize.errors import CheckpointError


def name_of(path: Path, number: int, count: int) -> Path:
    """The file of one of several processes, from 0, in the place of `path`."""
    return path.with_name(f"{path.stem}-{number + 1}-of-{count}{path.suffix}")


def apart(tensors: Mapping[str, Tensor]) -> bool:
    """Whether some of them are sharded, so that each process has to write."""
    return any(shards.is_sharded(tensor) for tensor in tensors.values())


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, by the first process; or where some are sharded each process's rows to its own.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    if apart(tensors):
        file = name_of(path, processes.rank(), processes.count())
        storing.write_tensors_file(file, dict(_own(tensors)))
    elif processes.rank() == 0:
        storing.write_tensors_file(path, tensors)


def _own(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        part = shards.own(tensor)
        if part.numel() if shards.is_sharded(tensor) else processes.rank() == 0:
            yield name, part


def files(path: Path) -> list[Path]:
    """The file that `path` names, or the pieces in its place, in order; the file where there is neither.

    Raises:
        CheckpointError: some of the pieces are missing.
    """
    if path.is_file():
        return [path]
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d+)-of-(\d+){re.escape(path.suffix)}")
    matches = [pattern.fullmatch(found.name) for found in path.parent.glob(f"{path.stem}-*{path.suffix}")]
    counts = {int(match[2]) for match in matches if match}
    if len(counts) != 1:
        return [path]
    found = [name_of(path, number, *counts) for number in range(*counts)]
    missing = [piece for piece in found if not piece.is_file()]
    if missing:
        raise CheckpointError(
            f"{missing[0]}: is missing, and holds a part of every tensor. Delete {path.parent}, then {storing.AGAIN}"
        )
    return found


def remove(path: Path) -> None:
    """Delete the file and its pieces, of however many processes."""
    for found in (path, *path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")):
        storing.remove(found)


class Pieces:
    """What `write` wrote, read from the disk as far as it is asked for.

    Args:
        path: the file, or that in whose place the pieces stand.

    Attributes:
        shapes: name -> shape of the whole tensor.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors; also of what reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: dict[str, list[tuple[Path, int]]] = {}
        self.shapes: dict[str, torch.Size] = {}
        for file in files(path):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    shape = opened.get_slice(name).get_shape()
                    before = self.shapes.get(name)
                    count = shape[0] if shape else 1
                    self._parts.setdefault(name, []).append((file, count))
                    whole = shape if before is None else [before[0] + count, *before[1:]]
                    self.shapes[name] = torch.Size(whole)

    def whole(self, name: str) -> Tensor:
        """A tensor, put together."""
        return self._rows(name, 0, sum(count for _, count in self._parts[name]))

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """What a process has of a tensor that is sharded as a parameter of its shape; all where that is not sharded."""
        if not shards.is_sharded(parameter):
            return self.whole(name)
        first, last = shards.rows(parameter)
        return torch.empty_like(shards.own(parameter)) if first == last else self._rows(name, first, last)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        found: list[Tensor] = []
        start = 0
        for file, count in self._parts[name]:
            begin, end = max(first - start, 0), min(last - start, count)
            start += count
            if begin < end:
                with _opened(file) as opened:
                    found.append(
                        opened.get_tensor(name) if end - begin == count else opened.get_slice(name)[begin:end]
                    )
        return found[0] if len(found) == 1 else torch.cat(found)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}). Delete {file.parent}, then {storing.AGAIN}"
        ) from error


def load(model: nn.Module, pieces: Pieces) -> None:
    """Copy saved values into the parameters that train.

    Raises:
        CheckpointError: names or shapes do not match the model.
    """
    parameters = trained(model)
    wrong = sorted(parameters.keys() ^ pieces.shapes.keys())
    wrong += [
        name
        for name in parameters.keys() & pieces.shapes.keys()
        if parameters[name].shape != pieces.shapes[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{pieces.path}: does not fit the model: {len(wrong)} of its tensors differ, first '{wrong[0]}'. "
            "Was it written with another recipe?"
        )
    for name, parameter in parameters.items():
        shards.own(parameter.detach()).copy_(pieces.of(name, parameter))


def write_folder(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], fill: Callable[[Path], None]
) -> None:
    """`storing.write_folder` by all processes: each writes its rows, the first the rest and the marker.

    Args:
        folder: where the complete folder shall be.
        tensors: file name -> tensors, sharded ones among them or not, alike in all processes.
        fill: writes the other files, in the first process.

    Raises:
        CheckpointError: in a process that could not write; of the attempt nothing is left.
        ProcessLost, FirstFailed: in the others.
    """
    beside = folder.with_name(f"{storing.PARTIAL}pieces")
    split = {name: given for name, given in tensors.items() if apart(given)}

    def everything(folder: Path) -> None:
        for name, given in tensors.items():
            if name in split:
                for piece in files(beside / name):
                    piece.rename(folder / piece.name)
            else:
                storing.write_tensors(folder / name, given)
        fill(folder)

    if split:
        processes.alone(lambda: storing.make_anew(beside))
        processes.each(partial(_write_all, beside, split))
    processes.alone(lambda: storing.write_folder(folder, everything))
    if split and processes.rank() == 0:
        storing.remove(beside)


def _write_all(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, given in tensors.items():
        write(folder / name, given)
