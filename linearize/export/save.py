"""Write a converted model as an ordinary checkpoint: safetensors, config, tokenizer, model card, remote-code bundle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from linearize import plain_json, storing
from linearize.errors import CheckpointError
from linearize.export.bundle import MODULE, auto_map, bundle
from linearize.export.card import model_card
from linearize.export.origin import BASE, origin
from linearize.export.verify import verify
from linearize.models.files import FOLDER, instead_of_file
from linearize.modes import open_up
from linearize.patch import changed
from linearize.surgery import converted


@dataclass(frozen=True)
class Weights:
    """Weight files that are there already.

    Attributes:
        folder: that they are moved out of.
        fingerprints: of every tensor of the model, see `reloading`.
    """

    folder: Path
    fingerprints: dict[str, list[Any]]


def save(
    model: PreTrainedModel,
    path: str | Path,
    *,
    tokenizer: Any = None,
    recipe: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    base: str | Mapping[str, str] = "",
    remote_code: bool = True,
    about: str = "",
    max_shard_size: str = "5GB",
    check: bool = False,
    weights: Weights | None = None,
) -> Path:
    """Write `model` to the folder `path`.

    The folder appears whole or not at all: it is written beside its place and renamed.

    Args:
        model: a converted model (after LoRA is merged), or any model of transformers.
        path: the folder; an empty one, or one that holds a checkpoint, is replaced.
        tokenizer: saved along when given, padding on the side that its own files say.
        recipe: the composed recipe, for the card and `linearize.json`.
        metrics: results, likewise.
        base: what was converted (the MODEL argument), for the card and `linearize.json`, or what another checkpoint's
            `linearize.json` says of it (`origin.recorded`).
        remote_code: also write `modeling_linearized.py`, so that the folder loads without this package through
            `trust_remote_code=True`.
        about: a further paragraph of the card.
        max_shard_size: largest weight file.
        check: load the folder in a fresh process and compare it with the model, see `verify`, before it is put in its
            place; for converted models.
        weights: written by others; `model` is then one without weights.

    Returns:
        The folder.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or something else than a checkpoint is there
            and would be lost; what was there before is untouched. Or the
            folder does not give back the model; it then stands beside its place, as `<path>-failed`.
    """
    path = Path(path)
    made_of = origin(base) if isinstance(base, str) else dict(base)
    scratch: Path | None = None
    try:
        _check_place(path)
        path = path.resolve() if path.is_symlink() else path  # the link stays, and leads to the new one
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        if weights is None:
            model.save_pretrained(scratch, max_shard_size=max_shard_size)
        else:
            model.save_pretrained(scratch, state_dict={})
            for file in weights.folder.iterdir():
                shutil.move(file, scratch / file.name)
        if tokenizer is not None:
            save_tokenizer(tokenizer, scratch)
        if remote_code and converted(model):
            (scratch / f"{MODULE}.py").write_text(bundle(model))
            config = json.loads((scratch / "config.json").read_text())
            config["auto_map"] = auto_map(model)
            (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        provenance = {**made_of, "recipe": recipe or {}, "metrics": metrics or {}}
        (scratch / "linearize.json").write_text(plain_json.dumps(provenance, indent=2, default=str) + "\n")
        (scratch / "README.md").write_text(
            model_card(
                model, base=made_of.get(BASE, ""), recipe=recipe or {}, metrics=metrics or {}, about=about
            )
        )
        open_up(scratch)
        if check and converted(model):
            _check(model, scratch, path, remote_code=remote_code, weights=weights)
        replace_folder(scratch, path)
    except Exception as error:
        # the tokenizer's library raises a plain Exception
        if isinstance(error, OSError | SafetensorError) or storing.is_full(error):
            of_a_run = (path.parent / "recipe.yaml").is_file()
            again = storing.AGAIN if of_a_run else storing.ONCE_MORE
            raise storing.could_not_write(path, error, untouched=True, again=again) from error
        raise
    finally:
        if scratch is not None:  # gone where all went well; Ctrl-C and a stop leave nothing either
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def _check(
    model: PreTrainedModel, scratch: Path, path: Path, *, remote_code: bool, weights: Weights | None
) -> None:
    """`verify`, which keeps a folder that does not pass under a name that says so."""
    try:
        tensors = None if weights is None else weights.fingerprints
        verify(model, scratch, remote_code=remote_code, tensors=tensors)
    except CheckpointError as error:
        failed = path.with_name(f"{path.name}-failed")
        shutil.rmtree(failed, ignore_errors=True)
        scratch.rename(failed)
        raise CheckpointError(
            f"{path}: the export did not pass its check: {error}. It was left in {failed} with all its weights, and "
            f"{path} is as it was; please report what the check says"
        ) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer as it was loaded: padding and truncation of the last batch would be written along."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    own = getattr(tokenizer, "init_kwargs", {}).get("padding_side", type(tokenizer).padding_side)
    with changed(tokenizer, "padding_side", own):
        tokenizer.save_pretrained(folder)


def _check_place(path: Path) -> None:
    """Refuse a place where replacing loses something that is no checkpoint."""
    other = "a file" if path.is_file() else instead_of_file(path)
    if other == FOLDER:
        known = (path / "config.json").is_file() or next(path.iterdir(), None) is None
        other = None if known else "a folder that holds other things than a checkpoint"
    if other is not None:
        raise CheckpointError(f"{path} is {other}, which would be lost; give another folder")


def replace_folder(new: Path, path: Path) -> None:
    """Put folder `new` in the place of `path`; the old one is removed only once the new one is there."""
    old = path.with_name(f".{path.name}-old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
