"""Combinations that the types allow but that cannot work, all known before any weight is loaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from linearize.config.schema import Recipe
from linearize.config.stages import source_problem, stage_problems
from linearize.config.values import shown
from linearize.registry import closest

LAYER_FORMS = "all, {every: 4}, [0, 2, 5] or {keep: [7, 15]}"


def problems(recipe: Recipe, broken: Collection[str] = ()) -> list[str]:
    """Every impossible combination in a recipe, one sentence each.

    Args:
        recipe: its fields have the right types.
        broken: dotted keys that a problem has been written for already; they hold a default instead of what the
            user wrote, so a combination that involves one of them is not judged.
    """
    found = _layers(recipe.layers)
    if "mixer" not in broken:
        found += _mixer(recipe.mixer)
    for name, stage in recipe.stages.items():
        found += stage_problems(name, stage, recipe, broken)
    return found + _source(recipe) + _tasks(recipe)


def _layers(layers: Any) -> list[str]:
    if layers == "all":
        return []
    if isinstance(layers, (list, tuple)):
        return _indices("layers", layers, empty="an empty list converts nothing")
    if isinstance(layers, dict) and len(layers) == 1:
        ((form, value),) = layers.items()
        if form == "every":
            if isinstance(value, int) and not isinstance(value, bool) and value >= 2:
                return []
            return [f"layers.every: must be a whole number of at least 2, got {shown(value)}"]
        if form == "keep":
            if isinstance(value, (list, tuple)):
                return _indices("layers.keep", value, empty="")
            return [f"layers.keep: must be a list of layer numbers, got {shown(value)}"]
        return [f"layers.{form}: unknown key; {closest(str(form), ['every', 'keep'])}"]
    if isinstance(layers, dict) and layers:
        return [f"layers: takes one key, got {', '.join(map(str, layers))}; valid forms: {LAYER_FORMS}"]
    return [f"layers: must be {LAYER_FORMS}, got {shown(layers)}"]


def _indices(path: str, values: list[Any] | tuple[Any, ...], *, empty: str) -> list[str]:
    if not values:
        return [f"{path}: {empty}"] if empty else []
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int) or value < 0]
    if wrong:
        return [
            f"{path}: layer numbers are whole and count from 0, got {', '.join(shown(value) for value in wrong)}"
        ]
    twice = sorted({value for value in values if list(values).count(value) > 1})
    return [f"{path}: names layer {', '.join(map(str, twice))} twice"] if twice else []


def _mixer(mixer: dict[str, Any]) -> list[str]:
    if not mixer:
        return [
            "mixer: missing; name its parts, for example {feature_map: hedgehog, update: additive, window: none}"
        ]
    wrong = [
        f"mixer.{part}: must be a name or {{name: ..., option: value}}, got {shown(value)}"
        for part, value in mixer.items()
        if not isinstance(value, dict)
    ]
    if wrong:
        return wrong
    from linearize import mixers  # late: it imports torch, which listing the recipes does not need

    return [found if found.startswith("mixer") else f"mixer: {found}" for found in mixers.check(mixer)]


def _source(recipe: Recipe) -> list[str]:
    named = {"data.source": recipe.data.source, "data.validation": recipe.data.validation}
    return [problem for path, value in named.items() if (problem := source_problem(path, value))]


def _tasks(recipe: Recipe) -> list[str]:
    tasks = recipe.eval.tasks
    if not tasks:
        return []
    found = []
    known = task_names()
    for task in tasks:
        if task != "all" and task not in known:
            found.append(f"eval.tasks: unknown task '{task}'; {closest(task, ['all', *known])}")
    if not recipe.eval.task_data:
        found.append("eval.task_data: the tasks need the folder that holds their JSONL files")
    return found


def task_names() -> list[str]:
    """Tasks that `linearize.eval` carries: the stems of its task files."""
    folder = Path(__file__).resolve().parent.parent / "eval" / "tasks"
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))
