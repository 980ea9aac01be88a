"""Combinations inside one stage that the types allow but that cannot work."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from linearize.config import layers, rules, variants
from linearize.config.changing import part_problems
from linearize.config.mix import mix_problems, only_plain, source_problem, sources
from linearize.config.names import TEACHER
from linearize.config.ranges import Range
from linearize.config.schedule import Over
from linearize.config.schema import DataConfig, Recipe, StageConfig
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


def strangers(raw: dict[str, Any]) -> list[str]:
    """Take stages without an objective out of a recipe that has others: a misspelt name made them, not a wish.

    Args:
        raw: plain values, changed in place.

    Returns:
        One sentence for each, with the stage that was meant.
    """
    stages = raw.get("stages")
    if not isinstance(stages, Mapping):
        return []
    known = [name for name, stage in stages.items() if not isinstance(stage, Mapping) or "objective" in stage]
    strange = [name for name in stages if name not in known]
    if not known:
        return []
    raw["stages"] = {name: stages[name] for name in known}
    return [
        f"stages.{name}: this recipe has no such stage; {_ended(closest(name, known))} A new stage names its "
        f"objective (stages.{name}.objective=next_token)"
        for name in strange
    ]


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
    if len(name) > rules.LONGEST_NAME:
        found.append(f"{path[:60]}...: a stage's name has at most {rules.LONGEST_NAME} characters")
    if known(f"{path}.train"):
        found += _adapters(path, stage, section_known=known(f"{path}.lora"))
        found += _groups(path, stage, freeze_known=known(f"{path}.freeze"))
    if known(f"{path}.data"):
        found += _data(path, stage, recipe.data)
    if known(f"{path}.data", f"{path}.top_k", f"{path}.objective"):
        found += _answers(path, stage, recipe)
    own = None if stage.data is None else stage.data.length
    length_key = "data.length" if own is None else f"{path}.data.length"
    batch, length = (
        Over.of(x).values[0] for x in (stage.batch_size, recipe.data.length if own is None else own)
    )
    step = batch * length
    counts = (
        f"{path}.tokens",
        f"{path}.batch_size",
        f"{path}.data.length",
        "data.length",
    )
    if stage.tokens < step and known(*counts):
        found.append(
            f"{path}.tokens: {stage.tokens} is less than one optimizer step of batch_size {batch} x "
            f"{length_key} {length} = {step}; give {step} tokens or more, or make one of the others smaller"
        )
    elif known(*counts, f"{path}.window_dropout", f"{path}.lr_schedule"):
        found += part_problems(path, stage, recipe.data.length)
    if known(f"{path}.batch_size", f"{path}.micro_batch"):
        found += _micro_batch(path, stage)
    if known(f"{path}.lr", f"{path}.weight_decay"):
        found += _decay(path, stage)
    if known(f"{path}.objective"):
        found += _objective(path, stage, train_known=known(f"{path}.train"))
        if known(f"{path}.data", "data"):
            found += _pairs(path, stage, recipe)
        if known(f"{path}.window_dropout", "mixer", "mixers", "layers"):
            found += _window_dropout(path, stage, recipe)
    return found


def _micro_batch(path: str, stage: StageConfig) -> list[str]:
    size = stage.micro_batch
    problem = auto_or_count(f"{path}.micro_batch", size)
    if problem or size == "auto":
        return problem
    batch = next((batch for batch in Over.of(stage.batch_size).values if batch % size), None)
    if batch is None:
        return []
    fits = next(n for n in range(min(size, batch), 0, -1) if batch % n == 0)
    return [
        f"{path}.micro_batch: {size} does not divide batch_size {batch}, and every pass of a step has one shape; take "
        f"{fits} or auto"
    ]


def auto_or_count(path: str, value: Any, allowed: Range = rules.SEQUENCES) -> list[str]:
    """What is wrong with a number, of sequences if nothing else is said, that may be left to the machine."""
    if value == "auto":
        return []
    wrong = type(value) is not int or allowed.problem(value)
    return [f"{path}: {allowed.text}, or auto, got {shown(value)}"] if wrong else []


def _decay(path: str, stage: StageConfig) -> list[str]:
    shrinks = stage.lr * stage.weight_decay
    if shrinks < 1:
        return []
    return [
        f"{path}.weight_decay: each step shrinks the weights by lr x weight_decay = {shrinks:g}, which must be below 1"
    ]


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


def _answers(path: str, stage: StageConfig, recipe: Recipe) -> list[str]:
    """A teacher's likeliest tokens, for the one objective that knows what to do with them."""
    if not stage.top_k:
        return []
    if "logits_kl" not in stage.objective:
        return [f"{path}.top_k: is of logits_kl, which this stage does not have; remove top_k, or add it"]
    length = None if stage.data is None else stage.data.length
    if length is not None and not Over.of(length).constant:
        return [
            f"{path}.top_k: the teacher answers whole sequences once, and {path}.data.length cuts them; give one "
            "length, or remove top_k"
        ]
    return []


def _pairs(path: str, stage: StageConfig, recipe: Recipe) -> list[str]:
    """Objectives on pairs and data of pairs need each other."""
    from linearize import objectives  # late: see _objective

    wanted = [name for name in stage.objective if name in objectives.names("pair")]
    data = recipe.data.of(stage)
    if wanted and stage.data is not None and isinstance(stage.data.length, list):
        return [f"{path}.data.length: pairs have one length; give a number"]
    if wanted and (data.mix or TEACHER in sources(data)):
        what = "a mix" if data.mix else "the teacher's text"
        return [
            f"{path}.data: {what} holds no pairs; set {path}.data.source to a file of them, or to builtin"
        ]
    if (data.template == "preference") == bool(wanted):
        return []
    if wanted:
        return [
            f"{path}.objective.{wanted[0]}: compares pairs of answers; set {path}.data.template=preference"
        ]
    return [f"{path}.data.template: preference is for {', '.join(objectives.names('pair'))} alone"]


def _window_dropout(path: str, stage: StageConfig, recipe: Recipe) -> list[str]:
    if not Over.of(stage.window_dropout).most:
        return []
    from linearize import mixers, objectives  # late: see _objective

    found: list[str] = []
    if layers.problems(recipe.layers, recipe.mixers) or variants.form_problems(recipe.mixers):
        return found
    given = variants.given(recipe.mixer, recipe.mixers, recipe.layers)
    if any(mixers.check(mixer) for mixer in given):
        return found
    whole = [mixers.normalize(mixer) for mixer in given]
    missing = [
        [part for part in ("window", "feature_map") if mixer[part]["name"] == "none"] for mixer in whole
    ]
    if all(missing):
        has = (
            f"the mixer has no {' and no '.join(missing[0])}"
            if len(given) == 1
            else "no mixer has both branches"
        )
        found.append(
            f"{path}.window_dropout: {has}, and dropping the window needs both branches; remove window_dropout"
        )
    able = [mixer for mixer, lacks in zip(whole, missing, strict=True) if not lacks]
    whole_model = not set(stage.objective) & set(objectives.names("layer"))
    if whole_model and any(not mixer["window"].get("overlap") for mixer in able):
        found.append(
            f"{path}.window_dropout: without its window this mixer sees nothing at the start of a document, and "
            "only objectives per layer can leave that out; set mixer.window.overlap=true, or remove window_dropout"
        )
    return found


def _data(path: str, stage: StageConfig, data: DataConfig) -> list[str]:
    if stage.data is None:
        return []
    if stage.data.echo and data.of(stage).template == "preference":
        return [f"{path}.data.echo: pairs of answers are read as they are; remove it"]
    if stage.data.source is not None and (
        problem := source_problem(f"{path}.data.source", stage.data.source)
    ):
        return [problem]
    found = mix_problems(f"{path}.data", stage.data.mix, stage.data.source, None)
    if found or mix_problems("data", data.mix, data.source, DataConfig.source):
        return found
    if not only_plain(data.of(stage)):
        return []
    return ignored(f"{path}.data", stage.data, DataConfig(), plain_words(sources(data.of(stage))))


def plain_words(found: Collection[str]) -> str:
    """Whose text it is that takes no options: "builtin" or "teacher's"."""
    return "teacher's" if TEACHER in found else "builtin"


def ignored(path: str, given: object, default: DataConfig, what: str) -> list[str]:
    """Options that the package's own text and the teacher's have no use for: it is plain text of one split.

    Args:
        path: dotted key of the section.
        given: the section.
        default: what means nothing.
        what: whose text it is.
    """
    return [
        f"{path}.{field}: the {what} text takes no {field}, so {shown(value)} would be ignored; name a "
        f"{path}.source, or remove {field}"
        for field in ("split", "text_field", "template")
        if (value := getattr(given, field)) not in (None, getattr(default, field), "preference")
    ]


def _objective(path: str, stage: StageConfig, *, train_known: bool) -> list[str]:
    from linearize import objectives  # late: it imports torch, which listing the recipes does not need

    levels = {name: level for level in LEVELS for name in objectives.names(level)}
    if not stage.objective:
        return [f"{path}.objective: missing; valid: {', '.join(sorted(levels))}"]
    found = []
    for name in stage.objective:
        if name not in levels:
            found.append(f"{path}.objective.{name}: unknown objective; {closest(name, levels)}")
    used = {levels[name]: name for name in stage.objective if name in levels}
    if len(used) > 1:
        kinds = " and ".join(f"{used[level]} {LEVELS[level]}" for level in LEVELS if level in used)
        found.append(f"{path}.objective: {kinds}; one stage trains on one kind, so use two stages")
    elif "layer" in used and train_known and set(stage.train) - {"mixers"}:
        found.append(
            f"{path}.train: {used['layer']} is per layer and reaches the mixers alone; "
            f"train: [mixers], or an objective of the whole model ({', '.join(sorted(objectives.names('model')))})"
        )
    if stage.clip_by == "layer" and used and "layer" not in used:
        found.append(
            f"{path}.clip_by: layer is for stages in which layers learn by themselves, and "
            f"{next(iter(used.values()))} is not per layer; remove clip_by, or set it to all"
        )
    return found


def _ended(clause: str) -> str:
    return clause if clause.endswith("?") else f"{clause}."
