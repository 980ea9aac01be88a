"""A recipe's name or file, plus overrides, to a checked `Recipe`: files are laid over each other, `check` judges."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from linearize.config import files
from linearize.config.apply import apply, name_part
from linearize.config.overrides import parse
from linearize.config.schema import Recipe
from linearize.config.values import quoted, shown
from linearize.errors import LinearizeError, RecipeError, collected, raise_together
from linearize.registry import closest

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SELF = "_self_"
CHAIN = 20
"""Recipes that start from each other, at most."""


def compose(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Compose a recipe and check all of it before any weight is loaded.

    Args:
        recipe: the name of a shipped recipe, or the path of a YAML file. A file may start from a shipped recipe
            or from another file of its folder with ``defaults: [lolcats, _self_]``.
        overrides: ``key=value`` in hydra's grammar, applied in order. A mapping replaces what stands at its
            key; ``~key`` removes it; ``stages.*.key=value`` changes every stage. Naming another choice of a mixer
            part, here or in a file, drops the options of the choice that it replaces.

    Raises:
        RecipeError: with every problem found, each by its full dotted key and with the nearest valid name.
    """
    from linearize.config.check import check

    changes, problems = parse(overrides)
    raw, wrong = _load(recipe)
    problems += wrong
    problems += apply(raw, changes)
    checked, wrong = check(raw)
    problems += wrong
    if problems:
        raise RecipeError(problems, f"recipe {quoted(recipe)}")
    return checked


def outline(name: str) -> dict[str, Any]:
    """A shipped recipe as its files say it, with what it starts from merged in: unchecked, no defaults filled in."""
    from linearize.config.check import without_removed

    return without_removed(_Files(None).of(RECIPES / f"{name}.yaml", ()))


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every field spelled out; `compose` of that file gives the same recipe."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True, width=120)


def list_recipes() -> list[tuple[str, str]]:
    """Name and one-line description of each shipped recipe; a file without a description is a building block."""
    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        description = _description(path.read_text(encoding="utf-8"))
        if description:
            found.append((path.stem, str(description)))
    return found


@functools.lru_cache(256)
def _description(text: str) -> Any:
    """Of a shipped file, whose YAML is ours; libyaml reads it ten times as fast where it is there."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)).get("description")


def is_file_name(recipe: str | Path) -> bool:
    """Whether the RECIPE argument means a file rather than the name of a shipped recipe."""
    text = str(recipe)
    return isinstance(recipe, Path) or text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text


def _load(recipe: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The composed tree before overrides, and what is wrong with single keys of its files."""
    if is_file_name(recipe):
        try:
            path = Path(recipe).expanduser()
        except RuntimeError as error:  # ~name of nobody
            raise RecipeError([f"cannot read {quoted(recipe)}: {error}"]) from error
        own = _Files(path.parent)
        return own.of(path, ()), own.problems
    if recipe not in _names(RECIPES):
        shipped = [name for name, _ in list_recipes()]
        hint = closest(str(recipe), shipped)
        listed = "" if hint.startswith("valid") else f" (valid: {', '.join(shipped)})"
        raise RecipeError(
            [f"unknown recipe {quoted(recipe)}: {hint}{listed}; or give the path of a YAML file"],
            "recipe",
        )
    return _Files(None).of(RECIPES / f"{recipe}.yaml", ()), []


def _names(folder: Path | None) -> set[str]:
    """Recipes that a folder holds; none of one that cannot be listed."""
    try:
        return set() if folder is None else {path.stem for path in folder.glob("*.yaml")}
    except OSError:
        return set()


class _Files:
    """Recipe files laid over what they start from; each is read once.

    Args:
        folder: of the user's file, whose neighbors it may start from. Shipped recipes come first, so that a file
            called lolcats.yaml may start from `lolcats`.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.done: dict[Path, dict[str, Any]] = {}
        self.broken: dict[Path, LinearizeError] = {}
        self.endless = False
        self.problems: list[str] = []
        """With single keys of the files."""

    def of(self, path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
        """A file's keys over those of what it starts from.

        Args:
            path: of the file.
            chain: the files that led here.
        """
        where = f"recipe {quoted(path)}"
        if path in chain or len(chain) > CHAIN:
            names = " -> ".join(file.stem for file in (*chain, path)[-CHAIN:])
            self.endless = True
            raise RecipeError([f"defaults: recipes that start from each other without end: {names}"], where)
        if path in self.broken:
            raise self.broken[path]
        if path not in self.done:
            problems: list[str] = []
            own = files.read(path, problems)
            self.problems += [f"{path.name}: {problem}" if chain else problem for problem in problems]
            starts = _starts(own.pop("defaults", None), where)
            merged: dict[str, Any] = {}
            errors: list[LinearizeError] = []
            for name in starts:
                if self.endless:  # one circle is told, not every way around it
                    break
                if name == SELF:
                    merged = self._over(merged, own)
                    continue
                with collected(errors):  # of what it starts from, all that is missing or broken
                    merged = _merged(merged, self.of(self._find(name, path, where), (*chain, path)))
            try:
                raise_together(errors, where)
            except LinearizeError as error:
                self.broken[path] = error
                raise
            self.done[path] = merged
        return self.done[path]

    def _find(self, name: str, path: Path, where: str) -> Path:
        shipped, near = _names(RECIPES), _names(self.folder)
        if self.folder is not None and is_file_name(name):
            # a neighbor by its path
            folder, stem = os.path.split(os.path.abspath(self.folder / name))
            if folder == os.path.abspath(self.folder) and stem in near:
                return self.folder / f"{stem}.yaml"
        if name in shipped:
            return RECIPES / f"{name}.yaml"
        if name in near and self.folder is not None and self.folder / f"{name}.yaml" != path:
            return self.folder / f"{name}.yaml"
        hint = closest(name, (shipped | near) - {path.stem})
        raise RecipeError([f"defaults: unknown recipe {quoted(name)}; {hint}"], where)

    def _over(self, below: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """A file that names another choice of a mixer part drops the options of the one it replaces."""
        merged = _merged(below, own)
        _named_anew(below.get("mixer"), own.get("mixer"), merged.get("mixer"))
        before, changes, after = (x if isinstance(x, dict) else {} for x in (
            below.get("mixers"), own.get("mixers"), merged.get("mixers")
        ))  # fmt: skip
        for name in changes:
            _named_anew(before.get(name), changes[name], after.get(name))
        return merged


def _named_anew(below: Any, own: Any, merged: Any) -> None:
    """Where a file names another choice of a part of a mixer, put it into `merged` without the inherited options."""
    if not isinstance(own, dict):
        return
    laid = dict(below) if isinstance(below, dict) else {}
    for part, value in own.items():
        if isinstance(value, dict) and "name" in value:
            name_part(laid, part, value)
            merged[part] = laid[part]


def _starts(defaults: Any, where: str) -> list[str]:
    """The names of a defaults list, the file's own place among them."""
    if defaults is None:
        return [SELF]
    form = "a list of recipes such as [lolcats, _self_]"
    if not isinstance(defaults, list):
        raise RecipeError([f"defaults: must be {form}, got {shown(defaults)}"], where)
    problems = [
        f"defaults[{index}]: must be the name of a recipe, got {shown(name)}; defaults is {form}"
        for index, name in enumerate(defaults)
        if not isinstance(name, str)
    ]
    if problems:
        raise RecipeError(problems[:10], where)
    names = [name.removesuffix(".yaml") for name in defaults]
    twice = (
        sorted({shown(name) for name in names if names.count(name) > 1})[:10]
        if len(names) < 1000
        else ["many"]
    )
    if twice:
        raise RecipeError([f"defaults: names {', '.join(twice)} twice"], where)
    return names if SELF in names else [*names, SELF]


def _merged(below: Any, above: Any) -> Any:
    """Mappings merge key by key; of anything else `above` is left."""
    if not isinstance(above, dict):
        return above
    under = below if isinstance(below, dict) else {}
    return {**under, **{key: _merged(under.get(key), value) for key, value in above.items()}}
