"""Writing what must never be lost: whole folders or whole files appear at once, or not at all.

A checkpoint is written into a hidden folder beside its place, flushed to the disk, given a marker that lists
its files, and renamed. Only a folder whose marker agrees with its files is ever resumed from, and older ones
go when the new one is there. Tensors are safetensors, everything else JSON; nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize.errors import CheckpointError

MARKER = "complete.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create `folder` with what `fill` writes, all at once.

    Args:
        folder: where the complete folder shall be; replaced when it is there already.
        fill: writes the files into the folder that it is given.

    Raises:
        CheckpointError: the disk is full or refuses; nothing of the attempt is left, and older checkpoints are
            untouched.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / MARKER).write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise could_not_write(folder, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def is_complete(folder: Path) -> bool:
    """Whether the folder has a marker and every file that the marker lists, at its full size."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def checkpoints(stage_folder: Path) -> list[Path]:
    """Complete `checkpoint-N` folders of a stage, oldest first."""
    if not stage_folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in stage_folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found) if is_complete(path)]


def latest(stage_folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage, or None."""
    return next(reversed(checkpoints(stage_folder)), None)


def prune(stage_folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and every incomplete one."""
    kept = set(checkpoints(stage_folder)[-keep:] if keep else [])
    for path in list(stage_folder.iterdir()):
        if (_NAME.match(path.name) or path.name.startswith(".partial-")) and path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Replace a text file at once: a reader sees the old text or the new, never a part.

    Raises:
        CheckpointError: the disk is full or refuses; the old file is intact.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise could_not_write(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """`write_file` of a JSON value.

    Raises:
        CheckpointError: see `write_file`.
    """
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors as safetensors, from whatever device they are on."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"}
    )


def write_tensors_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file at once.

    Raises:
        CheckpointError: the disk is full or refuses; the old file is intact.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        write_tensors(partial, tensors)
        _flush(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise could_not_write(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file to the CPU.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Delete {path.parent}, then go on with --resume"
        ) from error


def could_not_write(path: Path, error: Exception) -> CheckpointError:
    """The error that a user sees when a file or folder could not be written."""
    if is_full(error):
        return CheckpointError(
            f"{path}: the disk is full. The previous checkpoint is intact: free space and go on with --resume"
        )
    return CheckpointError(f"{path}: could not be written ({error}). The previous checkpoint is intact")


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, as an OSError or in Rust's words."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error)
    return "No space left on device" in text or "os error 28" in text or "Disk quota exceeded" in text


def _flush(path: Path) -> None:
    """Ask the disk to have it before we go on; without this a power cut can leave a renamed but empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems do not flush folders
            raise
    finally:
        os.close(descriptor)
