"""Combinations inside one stage that the types allow but that cannot work."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from linearize.config.schema import Recipe, StageConfig
from linearize.config.values import shown
from linearize.registry import closest

if TYPE_CHECKING:
    from linearize.objectives.base import Level

LEVELS: dict[Level, str] = {
    "layer": "is per layer",
    "model": "is of the whole model",
    "pair": "is on pairs of answers",
}
"""Level of objectives -> what is said of one."""


def stage_problems(name: str, stage: StageConfig, recipe: Recipe, broken: Collection[str]) -> list[str]:
    """Every impossible combination in one stage; see `semantics.problems` for `broken`."""
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
        found += _groups(path, stage, freeze_known=known(f"{path}.freeze"))
    if known(f"{path}.data"):
        found += _data(path, stage)
    length = recipe.data.of(stage).length
    own_length = stage.data is not None and stage.data.length is not None
    length_key = f"{path}.data.length" if own_length else "data.length"
    step = stage.batch_size * stage.grad_accum * length
    counts = (
        f"{path}.tokens",
        f"{path}.batch_size",
        f"{path}.grad_accum",
        f"{path}.data.length",
        "data.length",
    )
    if stage.tokens < step and known(*counts):
        found.append(
            f"{path}.tokens: {stage.tokens} is less than one optimizer step of batch_size {stage.batch_size} x "
            f"grad_accum {stage.grad_accum} x {length_key} {length} = {step}"
        )
    if known(f"{path}.objective"):
        found += _objective(path, stage, train_known=known(f"{path}.train"))
        if known(f"{path}.data", "data"):
            found += _pairs(path, stage, recipe)
        if known(f"{path}.window_dropout", "mixer"):
            found += _window_dropout(path, stage, recipe.mixer)
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


def _groups(path: str, stage: StageConfig, *, freeze_known: bool) -> list[str]:
    """What only some ways of training can have: a rate of the mixers' own, frozen roles, untied embeddings."""
    found = []
    if stage.lr_mixers is not None and not {"mixers", "all"} & set(stage.train):
        found.append(
            f"{path}.lr_mixers: the mixers do not train; add mixers to {path}.train or remove lr_mixers"
        )
    if "all" not in stage.train:
        if stage.freeze:
            found.append(
                f"{path}.freeze: names what train: [all] leaves out, but train is [{', '.join(stage.train)}], "
                "which holds none of it; remove freeze"
            )
        if stage.untie:
            found.append(f"{path}.untie: the embeddings train only with train: [all]; remove untie")
    elif stage.untie and freeze_known and "embeddings" in stage.freeze:
        found.append(
            f"{path}.untie: frozen embeddings stay equal; take embeddings out of freeze, or remove untie"
        )
    return found


def _pairs(path: str, stage: StageConfig, recipe: Recipe) -> list[str]:
    """Objectives on pairs and data of pairs need each other."""
    from linearize import objectives  # late: see _objective

    wanted = [name for name in stage.objective if name in objectives.names("pair")]
    if (recipe.data.of(stage).template == "preference") == bool(wanted):
        return []
    if wanted:
        return [
            f"{path}.objective.{wanted[0]}: compares pairs of answers; set {path}.data.template=preference"
        ]
    return [f"{path}.data.template: preference is for {', '.join(objectives.names('pair'))} alone"]


def _window_dropout(path: str, stage: StageConfig, mixer: dict[str, Any]) -> list[str]:
    if not stage.window_dropout:
        return []
    from linearize import mixers, objectives  # late: see _objective

    found = []
    if set(stage.objective) & {*objectives.names("model"), *objectives.names("pair")}:
        found.append(
            f"{path}.window_dropout: is for objectives per layer ({', '.join(objectives.names('layer'))})"
        )
    if not mixers.check(mixer):
        whole = mixers.normalize(mixer)
        missing = [part for part in ("window", "feature_map") if whole[part]["name"] == "none"]
        if missing:
            found.append(
                f"{path}.window_dropout: the mixer has no {' and no '.join(missing)}, and dropping the window needs "
                "both branches; remove window_dropout"
            )
    return found


def _data(path: str, stage: StageConfig) -> list[str]:
    if stage.data is None or stage.data.source is None:
        return []
    problem = source_problem(f"{path}.data.source", stage.data.source)
    return [problem] if problem else []


def source_problem(path: str, value: Any) -> str | None:
    """What is wrong with a text source, or None; whether the text is there shows when it is read."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    if texts and all(isinstance(text, str) and text for text in texts):
        return None
    return f"{path}: must be builtin, a file, a folder, a hub dataset, or a list of these, got {shown(value)}"


def _objective(path: str, stage: StageConfig, *, train_known: bool) -> list[str]:
    from linearize import objectives  # late: it imports torch, which listing the recipes does not need

    levels = {name: level for level in LEVELS for name in objectives.names(level)}
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
        kinds = " and ".join(f"{used[level]} {LEVELS[level]}" for level in LEVELS if level in used)
        found.append(f"{path}.objective: {kinds}; one stage trains on one kind, so use two stages")
    elif "layer" in used and train_known and set(stage.train) - {"mixers"}:
        found.append(
            f"{path}.train: {used['layer']} is per layer and reaches the mixers alone; "
            f"train: [mixers], or an objective of the whole model ({', '.join(sorted(objectives.names('model')))})"
        )
    return found
