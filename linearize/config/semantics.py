"""Combinations that the types allow but that cannot work, all known before any weight is loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linearize.config import layers, rules, variants
from linearize.config.mix import mix_problems, only_plain, source_problem, sources
from linearize.config.names import TEACHER
from linearize.config.schema import DataConfig, Recipe
from linearize.config.stages import auto_or_count, ignored, plain_words, stage_problems
from linearize.config.values import as_number, shown
from linearize.registry import closest


def problems(recipe: Recipe, broken: Collection[str] = ()) -> list[str]:
    """Every impossible combination in a recipe, one sentence each.

    Args:
        recipe: its fields have the right types.
        broken: dotted keys that a problem has been written for already; they hold a default instead of what the
            user wrote, so a combination that involves one of them is not judged.
    """
    found = [] if {"layers", "mixers"} & set(broken) else layers.problems(recipe.layers, recipe.mixers)
    of_mixers = [] if {"mixer", "mixers"} & set(broken) else _mixers(recipe)
    judged = not found and not of_mixers
    found += of_mixers
    if judged and not any(key.split(".")[0] in ("layers", "mixer", "mixers") for key in broken):
        found += _trained(recipe, broken)
    if "run.workers" not in broken:
        found += auto_or_count("run.workers", recipe.run.workers, rules.WORKERS)
    if "run.trackers" not in broken:
        found += _trackers(recipe.run.trackers)
    if "eval.batch_size" not in broken:
        found += auto_or_count("eval.batch_size", recipe.eval.batch_size)
    for name, stage in recipe.stages.items():
        found += stage_problems(name, stage, recipe, broken)
    found += _adapters(recipe, broken) + _imitated(recipe, broken)
    if len(recipe.stages) > rules.STAGES:
        found.append(f"stages: {len(recipe.stages)} of them; at most {rules.STAGES}")
    return found + _data(recipe, broken) + _tasks(recipe, broken)


def _trackers(asked: Any) -> list[str]:
    if asked in ("auto", "none"):
        return []
    names = [asked] if isinstance(asked, str) else asked
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return [
            f"run.trackers: must be auto, none, or names such as [tensorboard, wandb], got {shown(asked)}"
        ]
    return [
        f"run.trackers: unknown '{name}': {closest(name, ('auto', 'none', *rules.TRACKERS))}"
        for name in names
        if name not in rules.TRACKERS
    ]


def _mixers(recipe: Recipe) -> list[str]:
    """What is wrong with `mixer`, and with each of `mixers` beyond that."""
    found = _mixer("mixer", recipe.mixer)
    wrong = variants.form_problems(recipe.mixers)
    if wrong or not all(isinstance(options, dict) for options in recipe.mixer.values()):
        return found + wrong
    known = {problem.removeprefix("mixer") for problem in found}
    for name, whole in variants.sections(recipe.mixer, recipe.mixers).items():
        path = f"mixers.{name}"
        if name in recipe.mixers:  # what `mixer` has wrong is said once
            found += [p for p in _mixer(path, whole) if p.removeprefix(path) not in known]
    return found


def _mixer(path: str, mixer: dict[str, Any]) -> list[str]:
    if not mixer:
        return [
            f"{path}: missing; name its parts, for example {{feature_map: hedgehog, update: additive, window: none}}"
        ]
    wrong = [
        f"{path}.{part}: must be a name or {{name: ..., option: value}}, got {shown(value)}"
        for part, value in mixer.items()
        if not isinstance(value, dict)
    ]
    if wrong:
        return wrong
    from linearize import mixers  # late: it imports torch, which listing the recipes does not need

    return [
        f"{path}{found.removeprefix('mixer')}" if found.startswith("mixer") else f"{path}: {found}"
        for found in mixers.check(mixer)
    ]


def _trained(recipe: Recipe, broken: Collection[str]) -> list[str]:
    """What starts untrained is trained by some stage, and what a stage trains is there."""
    from linearize import mixers  # late: see _mixer

    if "stages" in broken:
        return []
    given = variants.given(recipe.mixer, recipe.mixers, recipe.layers)
    if not recipe.stages:
        calibrated = recipe.calibrate.tokens > 0 or any(key.split(".")[0] == "calibrate" for key in broken)
        if calibrated or not any(mixers.needs_training(mixer) for mixer in given):
            return []
        return [
            "stages: empty, but this mixer computes nothing useful before it has been trained or calibrated; keep a "
            "stage, or name one (stages.transfer.objective=attention_output), or set calibrate.tokens=16384. Every run "
            "measures its untrained mixers too, as 'swapped, untrained'"
        ]
    if any(mixers.has_parameters(mixer) for mixer in given):
        return []
    return [
        f"stages.{name}.train: the mixer has no parameters, so train: [mixers] would do nothing; train lora or all, or "
        f"remove the stage (~stages.{name})"
        for name, stage in recipe.stages.items()
        if stage.train == ["mixers"] and f"stages.{name}.train" not in broken
    ]


def _adapters(recipe: Recipe, broken: Collection[str]) -> list[str]:
    """Stages hang in one adapter and train it one after the other, so none can want another than the first."""
    given = {name: asdict(stage.lora) for name, stage in recipe.stages.items() if stage.lora is not None}
    if len(given) < 2 or "stages" in broken:
        return []
    (first, wanted), *later = given.items()
    found = []
    for name, own in later:
        for key, value in own.items():
            paths = [f"stages.{stage}.lora" for stage in (first, name)]
            if {x for path in paths for x in (path, f"{path}.{key}")} & set(broken):
                continue
            other = set(value) != set(wanted[key]) if key == "targets" else value != wanted[key]
            if other:
                found.append(
                    f"{paths[1]}.{key}: {shown(value)} is not the {shown(wanted[key])} of {paths[0]}.{key}, and stages "
                    f"share one adapter; give both the same, or let one of them train: [all]"
                )
    return found


def _imitated(recipe: Recipe, broken: Collection[str]) -> list[str]:
    """A stage per layer imitates the model's own attention, of which nothing is left once its projections trained."""
    from linearize import objectives  # late: see _mixer

    if "stages" in broken:
        return []
    of_layers, before, found = set(objectives.names("layer")), "", []
    for name, stage in recipe.stages.items():
        unknown = {f"stages.{name}.{key}" for key in ("train", "objective")} & set(broken)
        used = [objective for objective in stage.objective if objective in of_layers]
        if before and used and not unknown:
            found.append(
                f"stages.{name}.objective: {used[0]} imitates the model's own attention, and by then {before} has "
                f"trained what attention reads, so it would imitate something else; put {name} in front of it, or "
                "take an objective of the whole model (logits_kl)"
            )
        if not before and not unknown and {"lora", "all"} & set(stage.train):
            before = f"stage '{name}' (train: [{', '.join(stage.train)}])"
    return found


def _data(recipe: Recipe, broken: Collection[str]) -> list[str]:
    """Sources in one of their forms, and options only where a source reads them."""
    data = recipe.data
    named = {"data.source": data.source, "data.validation": data.validation}
    found = [
        problem
        for path, value in named.items()
        if path not in broken and (problem := source_problem(path, value))
    ]
    found += [
        f"eval.texts.{name}: names no file" for name, file in recipe.eval.texts.items() if not file.strip()
    ]
    if TEACHER in sources(DataConfig(source=data.validation)):
        found.append(
            "data.validation: the teacher's own text is no measure of it: it is what it expects; give text that "
            "somebody else wrote"
        )
    found += _teacher(data, broken)
    if "data.mix" not in broken:
        found += mix_problems("data", data.mix, data.source, DataConfig.source)
    if found or {"data.source", "data.mix", "data.validation", "data"} & set(broken):
        return found
    if any(
        mix_problems(name, stage.data.mix, None, None) for name, stage in recipe.stages.items() if stage.data
    ):
        return found  # said where the stage is judged
    alone = only_plain(DataConfig(source=data.validation)) and only_plain(data)
    alone = alone and all(only_plain(data.of(stage)) for stage in recipe.stages.values())
    return ignored("data", data, DataConfig(), plain_words(sources(data))) if alone else []


def _teacher(data: DataConfig, broken: Collection[str]) -> list[str]:
    """What may be left to the teacher's tokenizer and the machine."""
    found = []
    if "data.teacher.batch" not in broken:
        found += auto_or_count("data.teacher.batch", data.teacher.batch)
    if data.teacher.chat != "auto" and "data.teacher.chat" not in broken:
        number = as_number(data.teacher.chat)
        if number is None or rules.CHAT.problem(number):
            found.append(f"data.teacher.chat: {rules.CHAT.text}, or auto, got {shown(data.teacher.chat)}")
    return found


def _tasks(recipe: Recipe, broken: Collection[str]) -> list[str]:
    tasks = recipe.eval.tasks
    if not tasks:
        return []
    found = []
    known = task_names()
    for task in dict.fromkeys(tasks):
        if task != "all" and task not in known:
            found.append(f"eval.tasks: unknown task {shown(task)}; {closest(task, ['all', *known])}")
    if not recipe.eval.task_data and "eval.task_data" not in broken:
        found.append("eval.task_data: the tasks need the folder that holds their JSONL files")
    return found


def task_names() -> list[str]:
    """Tasks that `linearize.eval` carries: the stems of its task files."""
    folder = Path(__file__).resolve().parent.parent / "eval" / "tasks"
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))
