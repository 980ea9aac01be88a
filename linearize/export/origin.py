"""What a checkpoint was converted from, so that it is found again from another folder, and never taken for another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.errors import CheckpointError, ModelNotFoundError
from linearize.models.aliases import ALIASES
from linearize.models.check import shorten
from linearize.models.files import check_file, read_json

NOTE = "linearize.json"

NOTE_REMEDY = "fetch the checkpoint again, or take the file out to have nothing held against it"
BASE, PATH = "base", "base_path"
"""Keys of `linearize.json`: the MODEL argument as it was given, and where it lay if that was on this machine."""


def origin(base: str) -> dict[str, str]:
    """What `linearize.json` says of a MODEL argument.

    `models/mine` may be a folder here and somebody's repository on the hub, so a name is no address: of what is on this
    machine the absolute path is kept beside it.
    """
    if base in ALIASES or not base:
        return {BASE: base}
    try:
        path = Path(base).expanduser()
        local = path.exists()
    except (OSError, RuntimeError, ValueError):
        local = False
    return {BASE: base, PATH: str(path.resolve())} if local else {BASE: base}


def read_note(folder: Path) -> dict[str, Any]:
    """What an export says of itself, nothing where it has no `linearize.json`.

    Raises:
        CheckpointError: it is no file, no mapping, or its recipe is none, so that nothing could be held against it.
    """
    path = folder / NOTE
    check_file(path, NOTE_REMEDY)
    if not path.exists():
        return {}
    note = read_json(path)
    recipe = note.get("recipe")
    mixer = recipe.get("mixer") if isinstance(recipe, dict) else None
    mixers = recipe.get("mixers") if isinstance(recipe, dict) else None
    for key, value in {"recipe": recipe, "recipe.mixer": mixer, "recipe.mixers": mixers}.items():
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(
                f"{path}: {key} is {shorten(value)}, and a mapping is asked for; {NOTE_REMEDY}"
            )
    return note


def recorded(note: Mapping[str, Any]) -> dict[str, str]:
    """Both keys of a `linearize.json`; none of them where the first holds no text."""
    found = {key: value for key in (BASE, PATH) if isinstance(value := note.get(key), str) and value}
    return found if BASE in found else {}


def found(note: Mapping[str, Any]) -> str | None:
    """The MODEL argument under which what a checkpoint was converted from is found now; None where it says none.

    Raises:
        ModelNotFoundError: it was on the machine where it was converted, and is not on this one; the hub is not asked.
    """
    said = recorded(note)
    if PATH not in said:
        return said.get(BASE)
    for place in (
        said[PATH],
        said[BASE],
    ):  # the second: all of it has moved, and the names within are what they were
        if Path(place).expanduser().exists():
            return place
    raise ModelNotFoundError(f"there is no {said[PATH]}")


def published(note: Mapping[str, Any], base: str) -> dict[str, Any]:
    """A `linearize.json` for other machines: no path of this one, and the base's name on the hub or none."""
    return {**{key: value for key, value in note.items() if key != PATH}, BASE: base}
