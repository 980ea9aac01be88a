"""Combinations that the types allow but that cannot work, all known before any weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from linearize.config.schema import Recipe, StageConfig
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
        found += _stage(name, stage, recipe.data.length, broken)
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


def _stage(name: str, stage: StageConfig, length: int, broken: Collection[str]) -> list[str]:
    path = f"stages.{name}"

    def known(*keys: str) -> bool:
        return not any(
            key == bad or bad.startswith(f"{key}.") or bad.startswith(f"{key}[")
            for key in keys
            for bad in broken
        )

    found = []
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        found.append(f"{path}: a stage names a folder; use letters, digits, - and _")
    if known(f"{path}.train"):
        found += _adapters(path, stage, section_known=known(f"{path}.lora"))
    step = stage.batch_size * stage.grad_accum * length
    counts = (f"{path}.tokens", f"{path}.batch_size", f"{path}.grad_accum", "data.length")
    if stage.tokens < step and known(*counts):
        found.append(
            f"{path}.tokens: {stage.tokens} is less than one optimizer step of batch_size {stage.batch_size} x "
            f"grad_accum {stage.grad_accum} x data.length {length} = {step}"
        )
    if known(f"{path}.objective"):
        found += _objective(path, stage, train_known=known(f"{path}.train"))
    return found


def _adapters(path: str, stage: StageConfig, *, section_known: bool) -> list[str]:
    found = []
    if "lora" in stage.train and stage.lora is None and section_known:
        found.append(f"{path}.train: holds lora, but the stage has no lora section; add {path}.lora.rank=8")
    if stage.lora is not None and "lora" not in stage.train:
        found.append(
            f"{path}.lora: would not train; add lora to {path}.train or remove the section (~{path}.lora)"
        )
    if {"lora", "all"} <= set(stage.train):
        found.append(f"{path}.train: all and lora exclude each other; adapters are for frozen weights")
    return found


def _objective(path: str, stage: StageConfig, *, train_known: bool) -> list[str]:
    from linearize import objectives  # late: see _mixer

    levels = {name: level for level in ("layer", "model") for name in objectives.names(level)}
    if not stage.objective:
        return [f"{path}.objective: missing; valid: {', '.join(sorted(levels))}"]
    found = []
    for name, weight in stage.objective.items():
        if name not in levels:
            found.append(f"{path}.objective.{name}: unknown objective; {closest(name, levels)}")
        if weight < 0:
            found.append(f"{path}.objective.{name}: the weight must be above 0, got {weight:g}")
    used = {levels[name]: name for name in stage.objective if name in levels}
    if len(used) > 1:
        found.append(
            f"{path}.objective: {used['layer']} is per layer and {used['model']} is of the whole model; "
            "one stage trains on one kind, so use two stages"
        )
    elif "layer" in used and train_known and set(stage.train) - {"mixers"}:
        found.append(
            f"{path}.train: {used['layer']} is per layer and reaches the mixers alone; "
            f"train: [mixers], or an objective of the whole model ({', '.join(sorted(objectives.names('model')))})"
        )
    return found


def _source(recipe: Recipe) -> list[str]:
    found = []
    for key in ("source", "validation"):
        value = getattr(recipe.data, key)
        texts = value if isinstance(value, (list, tuple)) else [value]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            found.append(
                f"data.{key}: must be builtin, a file, a folder, a hub dataset, or a list of these, got {shown(value)}"
            )
    return found


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
