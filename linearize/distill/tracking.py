"""Trackers that a run's numbers go to beside metrics.jsonl: TensorBoard where it is installed, others by name.

They are accelerate's classes, fed with our own lines by the first process: the numbers are those of the file, and
nothing is gathered for them. A tracker that fails is let go with a word; the run goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from linearize import launched
from linearize.config.course import Course
from linearize.config.schema import Recipe
from linearize.errors import RecipeError

log = logging.getLogger(__name__)

PROJECT = "linearize"
NAMED = ("wandb", "trackio")
"""Trackers whose runs have names inside a project."""


def wanted(asked: Any) -> list[str]:
    """The trackers that `run.trackers` means here.

    Raises:
        RecipeError: one is not installed.
    """
    there = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    there |= LOGGER_TYPE_TO_CLASS.keys() - set(_known())
    if asked == "auto":
        return ["tensorboard"] if "tensorboard" in there else []
    names = [] if asked == "none" else [asked] if isinstance(asked, str) else list(asked)
    missing = [name for name in names if name not in there]
    if missing:
        raise RecipeError([f"run.trackers: {name} is not installed: pip install {name}" for name in missing])
    return names


def _known() -> list[str]:
    from accelerate.utils import LoggerType

    return [str(name.value) for name in LoggerType]


class Trackers:
    """The trackers of one run; nothing in a process that is not the first.

    Args:
        recipe: of the run; its `run.trackers`.
        folder: of the run, whose name theirs is; TensorBoard's files go to `tensorboard` in it.

    Raises:
        RecipeError: see `wanted`.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.folder = folder
        self.names = wanted(recipe.run.trackers) if launched.first() else []
        self._open: dict[str, Any] | None = None
        self._early: list[dict[str, Any]] = []
        self._step = 0
        self._before: dict[str, int] = {}
        total = 0
        for name, stage in recipe.stages.items():
            self._before[name] = total
            total += Course.of(stage, recipe.data.of(stage).length).steps

    def line(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, under its stage's name, at the run's step."""
        if self._open is None:
            self._begin_all()
        stage = line["stage"]
        self._step = self._before.get(stage, 0) + line["step"]
        values = {}
        for key, value in line.items():
            if key in ("stage", "step"):
                continue
            several = value if isinstance(value, list) else [value]
            for number, one in enumerate(several):
                name = f"{stage}/{key}/{number}" if isinstance(value, list) else f"{stage}/{key}"
                values[name] = one
        self._log({name: value for name, value in values.items() if type(value) in (int, float)})

    def row(self, row: dict[str, Any]) -> None:
        """A row of results.json, at the step that has been reached, the teacher's apart; waits for the first line."""
        kind = "teacher" if row["name"] == "teacher" else "eval"
        values = {f"{kind}/perplexity/{text}": value for text, value in row.get("perplexity", {}).items()}
        for task, metrics in row.get("tasks", {}).items():
            values |= {f"{kind}/{task}/{metric}": value for metric, value in metrics.items()}
        self._log(values)

    def finish(self) -> None:
        """Close what is open."""
        for name, tracker in list((self._open or {}).items()):
            self._try(name, tracker.finish)
        self._open = None

    def _log(self, values: dict[str, Any]) -> None:
        if not self.names or not values:
            return
        if self._open is None:
            self._early.append(values)
            return
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, step=self._step))

    def _begin_all(self) -> None:
        # not earlier: accelerate's trackers speak only once a trainer has told it what there is
        self._open = {}
        for name in self.names:
            self._try(name, lambda name=name: self._begin(name))
        early, self._early = self._early, []
        for values in early:
            self._log(values)

    def _begin(self, name: str) -> None:
        cls, given = LOGGER_TYPE_TO_CLASS[name], {}
        project = PROJECT
        if cls.requires_logging_directory:
            project, given = name, {"logging_dir": str(self.folder)}
        elif name in NAMED:
            given = {"name": self.folder.name}
        tracker = cls(project, **given)
        tracker.main_process_only = False  # there is none but this one, and nobody has told accelerate yet
        tracker.start()
        assert self._open is not None
        self._open[name] = tracker

    def _try(self, name: str, job: Any) -> None:
        try:
            job()
        except Exception as error:  # whatever a service's client raises: a run is not lost for its curves
            log.warning(
                "run.trackers: %s is let go, the run goes on: %s: %s", name, type(error).__name__, error
            )
            (self._open or {}).pop(name, None)
