"""A run's budget: the recipe scaled to it, by a timed pass where it is a time, and found again where a run goes on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from linearize import launched
from linearize.config import budget as rules
from linearize.config.budget import SCALED, Budget
from linearize.config.course import Course
from linearize.config.schedule import Over
from linearize.config.schema import Recipe, StageConfig, StageDataConfig
from linearize.distill.memory import TOKENS
from linearize.distill.rates import Timing
from linearize.errors import CheckpointError, RecipeError, RunFolderError
from linearize.progress import duration
from linearize.storing import read_json

log = logging.getLogger(__name__)

FACT = "budget"
"""Entry of environment.json."""
MARGIN = 0.95
"""Of a time that is planned for: a machine is not always as fast as in a short pass."""
TRIAL = 16_384
"""Tokens of a timed step, before anybody knows how large steps will be."""
Measure = Callable[[Recipe], dict[str, Timing]]


def smallest(recipe: Recipe) -> Recipe:
    """The recipe with the fewest tokens that it can have, for looking at everything else beforehand."""
    return rules.scaled(recipe, rules.least(recipe))


def fitted(recipe: Recipe, budget: Budget, *, cuda: bool, measure: Measure) -> tuple[Recipe, dict[str, Any]]:
    """The recipe for a budget, and what environment.json says of it.

    Args:
        recipe: with stages, checked against the budget (`config.budget.check`).
        budget: time, or tokens.
        cuda: whether steps of more tokens are faster than single sequences.
        measure: times the stages of a recipe; called for a time alone, once or twice.

    Raises:
        RecipeError: the time is not enough for a step of each stage.
    """
    facts: dict[str, Any] = {"given": budget.text, "stages": rules.plain(recipe.stages)}
    if budget.tokens is not None:
        found = rules.scaled(recipe, budget.tokens)
    else:
        assert budget.seconds is not None
        trial = _trial(recipe, one=not cuda, shares=launched.count())
        timings = measure(trial)
        found = _within(recipe, budget, timings)
        if cuda and _unlike(trial, found):
            timings = measure(found)
            found = _within(recipe, budget, timings)
        facts["timed"] = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
        facts["planned_seconds"] = round(_seconds(found, timings), 1)
    for line in said(recipe, found, budget, facts):
        log.info("%s", line)
    return found, facts


def said(recipe: Recipe, found: Recipe, budget: Budget, facts: dict[str, Any]) -> list[str]:
    """What came of a budget, in lines."""
    planned = facts.get("planned_seconds")
    about = "" if planned is None else f", about {duration(planned)} of training (evaluation comes on top)"
    return [f"--budget {budget.text}: {rules.whole(found):,} tokens{about}", *rules.outline(recipe, found)]


def again(recipe: Recipe, budget: Budget, run: Path) -> Recipe:
    """The recipe as the run in a folder has it, where it was begun with this recipe and budget; nothing is measured.

    What differs from the recipe that the run began with keeps its new value, so that the folder's own check names it.

    Args:
        recipe: as it was given, not scaled.
        budget: as given.
        run: the folder, with a recipe.yaml.

    Raises:
        RunFolderError: the run has another budget, or none.
        CheckpointError: environment.json or recipe.yaml is damaged.
    """
    file = run / "recipe.yaml"
    without = f"go on with that run by leaving --budget out and giving its own recipe, {file}"
    environment = run / "environment.json"
    facts = (
        read_json(environment, f"Delete {environment.name}; {without}").get(FACT)
        if environment.is_file()
        else None
    )
    if not isinstance(facts, dict) or not isinstance(facts.get("stages"), dict):
        raise RunFolderError(f"{run} holds a run without --budget: {without}")
    if facts.get("given") != budget.text:
        raise RunFolderError(
            f"{run} holds a run of --budget {facts.get('given')}, not {budget.text}: {without}, or choose another "
            "folder with --out"
        )
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
        stages = {
            name: _as_run(
                stage, rules.plain({name: stage})[name], facts["stages"].get(name), written.get(name)
            )
            for name, stage in recipe.stages.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{file}: holds no recipe ({error}). Choose another folder with --out"
        ) from error
    return dataclasses.replace(recipe, stages=stages)


def _as_run(stage: StageConfig, given: dict[str, Any], began: Any, written: Any) -> StageConfig:
    if not isinstance(began, dict) or not isinstance(written, dict):
        return stage
    same = [key for key in SCALED if key in began and key in written and began[key] == given[key]]
    values = {key: written[key] for key in same}
    if isinstance(values.get("data"), dict):
        values["data"] = StageDataConfig(**values["data"])
    return dataclasses.replace(stage, **values)


def _within(recipe: Recipe, budget: Budget, timings: dict[str, Timing]) -> Recipe:
    """The most tokens whose training ends within the budget."""
    assert budget.seconds is not None
    most = MARGIN * budget.seconds
    low = rules.least(recipe)
    if (least := _seconds(rules.scaled(recipe, low), timings)) > most:
        first = sum(timing.first for timing in timings.values())
        raise RecipeError(
            [
                f"--budget {budget.text}: one sequence for each stage takes {duration(least)} here, of which "
                f"{duration(first)} are first steps (compiling, recording); give {_ceil(least / MARGIN)}s or more, or "
                "tokens (100M-tokens)"
            ]
        )
    high = low
    while _seconds(rules.scaled(recipe, 2 * high), timings) <= most and high < 10**14:
        high *= 2
    low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) // 2
        low, high = (
            (middle, high) if _seconds(rules.scaled(recipe, middle), timings) <= most else (low, middle)
        )
    return rules.scaled(recipe, low)


def _seconds(recipe: Recipe, timings: dict[str, Timing]) -> float:
    return sum(timings[name].seconds(stage, recipe.data.length) for name, stage in recipe.stages.items())


def _trial(recipe: Recipe, *, one: bool, shares: int = 1) -> Recipe:
    """The recipe with steps that show how fast its stages are: the published ones may take minutes each."""
    stages = {}
    for name, stage in recipe.stages.items():
        length = recipe.data.of(stage).length
        batch = 1 if one else max(1, min(Over.of(stage.batch_size).most // shares, TRIAL // length))
        batch *= shares  # as many for each process
        data = stage.data
        if data is not None and data.length is not None:
            data = dataclasses.replace(data, length=length)
        stages[name] = dataclasses.replace(
            stage, batch_size=batch, micro_batch="auto", data=data, tokens=10_000 * batch * length
        )
    return dataclasses.replace(recipe, stages=stages)


def _unlike(timed: Recipe, found: Recipe) -> bool:
    """Whether some stage's steps are so far from those that were timed that their speed may be another."""
    for name, stage in found.stages.items():
        mine, other = _steps(found, stage), _steps(timed, timed.stages[name])
        if len(mine) > 1 or not 0.5 <= min(mine[0], TOKENS) / other[0] <= 4:
            return True
    return False


def _steps(recipe: Recipe, stage: StageConfig) -> list[int]:
    return [batch * length for batch, length in Course.of(stage, recipe.data.length).shapes]


def _ceil(number: float) -> int:
    return -int(-number // 1)
