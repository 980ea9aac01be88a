"""Writing what must never be lost: whole folders or whole files appear at once, or not at all.

A checkpoint is written into a hidden folder beside its place, flushed to the disk, given a marker that lists
its files with their sizes and checksums, and renamed. Only a folder whose marker agrees with its files is ever
resumed from, and older ones go when the new one is there. Tensors are safetensors, everything else JSON; nothing
is pickled.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize import plain_json
from linearize.errors import CheckpointError
from linearize.models.cache import sha256
from linearize.models.files import check_file
from linearize.modes import open_up

log = logging.getLogger(__name__)

PARTIAL = ".partial-"
"""What a file or folder that is still being written begins with."""
MARKER = "complete.json"
STATE = "trainer_state.json"
"""Where a checkpoint says which step it is of."""
ONCE_MORE = "give the command again"
AGAIN = f"{ONCE_MORE}, a run with --resume"
"""What goes on behind the newest intact checkpoint: `linearize select` trains as well, and has no such option."""
_NAME = re.compile(r"^checkpoint-(\d+)$")
_RUST = re.compile(r"^Error while serializing: (I/O error: )?| \(os error \d+\)$")
"""What safetensors says around the system's reason."""
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
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(partial.iterdir())
        }
        (partial / MARKER).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # what writes a single file has named that one, in a folder that is gone by now
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        if isinstance(cause, OSError | SafetensorError):
            raise could_not_write(folder, cause, kept=latest(folder.parent)) from cause
        raise


def is_complete(folder: Path) -> bool:
    """Whether the folder has a marker and every file that the marker lists, at its full size."""
    files = _listed(folder)
    try:
        return files is not None and all(
            (folder / name).stat().st_size == entry["size"] for name, entry in files.items()
        )
    except OSError:
        return False


def damaged(folder: Path) -> str | None:
    """Name of the first file of a complete checkpoint whose content is not what was written, or None; reads it all."""
    for name, entry in (_listed(folder) or {}).items():
        try:
            whole = (
                entry["sha256"] == sha256(folder / name) if "sha256" in entry else _readable(folder / name)
            )
        except OSError:
            whole = False
        if not whole:
            return name
    return None


def _listed(folder: Path) -> dict[str, dict[str, Any]] | None:
    """File -> size and, where it was kept, checksum, by the folder's marker; None without a readable one."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        listed = {
            name: {"size": entry} if isinstance(entry, int) else dict(entry) for name, entry in files.items()
        }
        return listed if all("size" in entry for entry in listed.values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _readable(path: Path) -> bool:
    """Whether a file that no checksum was kept of reads as what its name says."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, framework="pt") as file:
                file.keys()
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False
    return True


def checkpoints(stage_folder: Path) -> list[Path]:
    """Complete `checkpoint-N` folders of a stage, oldest first."""
    if not stage_folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in stage_folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found) if is_complete(path)]


def latest(stage_folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage, or None."""
    return next(reversed(checkpoints(stage_folder)), None)


def newest_intact(stage_folder: Path) -> Path | None:
    """The newest checkpoint of a stage that holds what was written, or None; damaged ones are removed with a notice.

    Raises:
        CheckpointError: one is of another step than its name says, so that which is the newest is not known.
    """
    found = checkpoints(stage_folder)
    for folder in found:
        step = _step(folder)
        if step is not None and folder.name != f"checkpoint-{step}":
            raise CheckpointError(
                f"{folder}: holds step {step}, so it was renamed or copied. Give it back the name checkpoint-{step}, "
                f"or move it out of the folder, then {AGAIN}"
            )
    for folder in reversed(found):
        name = damaged(folder)
        if name is None:
            return folder
        log.warning("%s: %s is damaged; going on from before it", folder, name)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _step(folder: Path) -> int | None:
    """The step that a checkpoint says it is of, or None where it does not say."""
    try:
        step = json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def prune(stage_folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and every incomplete one."""
    kept = set(checkpoints(stage_folder)[-keep:] if keep else [])
    for path in list(stage_folder.iterdir()):
        if (_NAME.match(path.name) or path.name.startswith(PARTIAL)) and path not in kept:
            remove(path)


def sweep(stage_folder: Path) -> None:
    """Delete what a process that was cut off left half written or half deleted in a stage's folder."""
    if stage_folder.is_dir():
        prune(stage_folder, keep=len(list(stage_folder.iterdir())))


def make_folder(folder: Path) -> None:
    """A folder, unless it is there.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise could_not_write(folder, error) from error


def make_anew(folder: Path) -> None:
    """An empty folder in the place of whatever is there.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    remove(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise could_not_write(folder, error) from error


def remove(path: Path) -> None:
    """Delete a file or folder as far as the disk lets us; what stays is deleted by the next process."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Replace a text file at once: a reader sees the old text or the new, never a part.

    Raises:
        CheckpointError: the disk is full or refuses; the old file is intact.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        os.replace(partial, path)
    except OSError as error:
        remove(partial)
        raise could_not_write(path, error) from error


def check_place(path: Path, remedy: str) -> None:
    """Refuse a place that nothing can be written to, before the work whose result is to lie there.

    Args:
        path: of the file or folder; folders above it may be missing.
        remedy: what to do, in words that follow a semicolon.

    Raises:
        CheckpointError: the disk is full, read-only or refuses.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(
            dir=above
        ):  # permissions say nothing to root, nor of a disk that is read-only
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from error


def write_json(path: Path, value: Any) -> None:
    """`write_file` of a JSON value; numbers that are not finite as `plain_json` writes them.

    Raises:
        CheckpointError: see `write_file`.
    """
    write_file(path, plain_json.dumps(value, indent=2) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON file's mapping.

    Args:
        path: the file.
        remedy: what to do where it is damaged, as a sentence.

    Raises:
        CheckpointError: the file is missing or none, not JSON, or holds no mapping.
    """
    check_file(path, remedy)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a mapping. {remedy}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors as safetensors, from whatever device they are on, with plain text beside them."""
    metadata = {"format": "pt"} if metadata is None else metadata
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    open_up(path)


def write_tensors_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, *, again: str = AGAIN
) -> None:
    """Replace a safetensors file at once; `again` as of `could_not_write`.

    Raises:
        CheckpointError: the disk is full or refuses; the old file is intact.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        write_tensors(partial, tensors, metadata)
        _flush(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        remove(partial)
        raise could_not_write(path, error, again=again) from error


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
            f"{path}: cannot be read ({error}). Delete {path.parent}, then {AGAIN}"
        ) from error


def could_not_write(
    path: Path, error: Exception, kept: Path | None = None, *, untouched: bool = False, again: str = AGAIN
) -> CheckpointError:
    """The error that a user sees when a file or folder could not be written.

    Args:
        path: what was being written.
        error: what the system said.
        kept: the checkpoint before it, where there is one.
        untouched: what had the name before is as it was.
        again: what to do once the cause is mended.
    """
    full = is_full(error)
    what = "the disk is full" if full else f"could not be written ({_RUST.sub('', str(error))})"
    intact = f". The previous checkpoint is intact ({kept.name})" if kept is not None else ""
    intact += ". What was there before is untouched" if untouched else ""
    remedy = "free space" if full else "mend the cause"
    return CheckpointError(f"{path}: {what}{intact}: {remedy}, then {again}")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, what the system refuses about a file of the folder, or a full disk, is an error that a user can mend.

    Raises:
        CheckpointError: see `could_not_write`.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error) and not _is_inside(error, folder):
            raise
        raise could_not_write(Path(error.filename or folder), error) from error


def _is_inside(error: OSError, folder: Path) -> bool:
    """Whether an error is about the folder or a file of it."""
    return isinstance(error.filename, str | Path) and Path(error.filename).absolute().is_relative_to(
        folder.absolute()
    )


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
