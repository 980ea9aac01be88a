"""A recipe's name or file, plus overrides, to a checked `Recipe`: hydra composes, `check` judges."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from linearize.config.overrides import Override, parse
from linearize.config.schema import Recipe
from linearize.errors import RecipeError
from linearize.registry import closest

if TYPE_CHECKING:
    from omegaconf import DictConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
_USER_FILE = "linearize_user_file"
_PART_NAME = re.compile(r"mixer\.(\w+)\.name")


def compose(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Compose a recipe and check all of it before any weight is loaded.

    Args:
        recipe: the name of a shipped recipe, or the path of a YAML file. A file may start from a shipped recipe
            or from another file of its folder with ``defaults: [lolcats, _self_]``.
        overrides: ``key=value`` in hydra's grammar, applied in order. A mapping replaces what stands at its
            key; ``~key`` removes it. Naming another choice of a mixer part, here or in a file, drops the options
            of the choice that it replaces.

    Raises:
        RecipeError: with every problem found, each by its full dotted key and with the nearest valid name.
    """
    from linearize.config.check import check

    where = f"recipe '{recipe}'"
    changes, problems = parse(overrides)
    raw, more = _apply(_load(recipe), changes)
    checked, wrong = check(raw)
    problems += more + wrong
    if problems:
        raise RecipeError(problems, where)
    return checked


def outline(name: str) -> dict[str, Any]:
    """A shipped recipe as its files say it, with what it starts from merged in: unchecked, no defaults filled in.

    For listing recipes, which must not take the time to import hydra.
    """
    from linearize.config.check import without_removed

    tree = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for start in tree.pop("defaults", ["_self_"]):
        merged = _merged(merged, tree if start == "_self_" else outline(start))
    return without_removed(merged)


def _merged(below: Any, above: Any) -> Any:
    """Mappings merge key by key; of anything else `above` is left."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every field spelled out; `compose` of that file gives the same recipe."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True, width=120)


def list_recipes() -> list[tuple[str, str]]:
    """Name and one-line description of each shipped recipe; a file without a description is a building block."""
    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        description = yaml.safe_load(path.read_text(encoding="utf-8")).get("description")
        if description:
            found.append((path.stem, str(description)))
    return found


def is_file_name(recipe: str | Path) -> bool:
    """Whether the RECIPE argument means a file rather than the name of a shipped recipe."""
    text = str(recipe)
    return isinstance(recipe, Path) or text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text


def _load(recipe: str | Path) -> DictConfig:
    """The composed tree before overrides."""
    if not is_file_name(recipe):
        names = [path.stem for path in RECIPES.glob("*.yaml")]
        if recipe not in names:
            shipped = [name for name, _ in list_recipes()]
            hint = closest(str(recipe), shipped)
            listed = "" if hint.startswith("valid") else f" (valid: {', '.join(shipped)})"
            raise RecipeError(
                [f"unknown recipe '{recipe}': {hint}{listed}; or give the path of a YAML file"], "recipe"
            )
        return _compose_with_hydra(str(recipe), [])
    path = Path(recipe).expanduser()
    from hydra.core.config_store import ConfigStore

    raw = _read_file(path)
    named = _named_parts(raw)
    ConfigStore.instance().store(name=_USER_FILE, node=raw)
    # Shipped recipes come first on the search path, so a file called lolcats.yaml may start from `lolcats`.
    tree = _compose_with_hydra(_USER_FILE, [f"hydra.searchpath=['file://{path.resolve().parent}']"], path)
    for part, options in named.items():
        _name_part(tree, part, options)
    return tree


def _named_parts(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the mixer parts that a file names out of it: whether they merge depends on what they start from."""
    mixer = raw.get("mixer")
    if not isinstance(mixer, dict):
        return {}
    named = {part: value for part, value in mixer.items() if isinstance(value, dict) and "name" in value}
    raw["mixer"] = {part: value for part, value in mixer.items() if part not in named}
    return named


def _name_part(tree: DictConfig, part: str, options: dict[str, Any]) -> None:
    """Set a mixer part by name: the options of another choice fall away, those of the same one stay."""
    from omegaconf import OmegaConf

    key = f"mixer.{part}"
    inherited = OmegaConf.select(tree, key)
    same = OmegaConf.is_dict(inherited) and inherited.get("name") == options["name"]
    OmegaConf.set_struct(tree, False)
    OmegaConf.update(tree, key, options, merge=same, force_add=True)


def _read_file(path: Path) -> dict[str, Any]:
    """A user's recipe file as plain values, its defaults list checked."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = f"recipe '{path}'"
    try:
        tree = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeError([f"cannot read {path}: {reason}"], where) from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError([f"not valid YAML: {' '.join(str(error).split())}"], where) from error
    raw = OmegaConf.to_container(tree)
    if not isinstance(raw, dict) or not raw:
        raise RecipeError(
            ["holds no keys; a recipe starts with `defaults: [lolcats, _self_]` or `mixer:`"], where
        )
    defaults = raw.get("defaults", [])
    if not isinstance(defaults, list):
        raise RecipeError([f"defaults: must be a list such as [lolcats, _self_], got {defaults!r}"], where)
    known = {file.stem for folder in (RECIPES, path.resolve().parent) for file in folder.glob("*.yaml")}
    known -= {path.stem} - {file.stem for file in RECIPES.glob("*.yaml")}
    problems = [
        f"defaults: unknown recipe '{name}'; {closest(name, known)}"
        for name in defaults
        if isinstance(name, str)
        and name != "_self_"
        and "/" not in name
        and name.removesuffix(".yaml") not in known
    ]
    if problems:
        raise RecipeError(problems, where)
    if defaults and "_self_" not in defaults:
        raw["defaults"] = [*defaults, "_self_"]  # hydra's own choice too, but with a warning
    return {str(key): value for key, value in raw.items()}


def _compose_with_hydra(name: str, overrides: list[str], path: Path | None = None) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with _hydra_of_our_own(), initialize_config_module("linearize.recipes", version_base="1.3"):
            return hydra_compose(name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        reasons = [str(error), str(error.__cause__ or "")]
        text = " ".join(" ".join(reasons).split()).replace(f"'{_USER_FILE}'", f"'{path}'")
        raise RecipeError([text], f"recipe '{path or name}'") from error


@contextmanager
def _hydra_of_our_own() -> Iterator[None]:
    """Let a program that runs under hydra itself call `compose`: its global state is put aside and back."""
    from hydra.core.global_hydra import GlobalHydra

    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = theirs


def _apply(tree: DictConfig, changes: Sequence[Override]) -> tuple[dict[str, Any], list[str]]:
    """Apply overrides in order; gives plain values and what could not be applied."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.set_struct(tree, False)
    problems: list[str] = []
    for change in changes:
        try:
            part = _PART_NAME.fullmatch(change.key)
            if change.remove:
                _remove(tree, change.key)
            elif part is not None:
                _name_part(tree, part[1], {"name": change.value})
            else:
                OmegaConf.update(tree, change.key, change.value, merge=False, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError, KeyError) as error:
            verb = "removed" if change.remove else "set there"
            problems.append(f"{change.key}: cannot be {verb}: {' '.join(str(error).split())}")
    try:
        raw = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        problems.append(" ".join(str(error).split()))
        raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict), "hydra composes a mapping"
    return {str(key): value for key, value in raw.items()}, problems


def _remove(tree: DictConfig, key: str) -> None:
    from omegaconf import OmegaConf

    *parents, last = key.split(".")
    node: Any = OmegaConf.select(tree, ".".join(parents)) if parents else tree
    if not OmegaConf.is_dict(node) or last not in node:
        names = list(map(str, node)) if OmegaConf.is_dict(node) else []
        raise ValueError(f"nothing to remove; {closest(last, names)}")
    del node[last]
