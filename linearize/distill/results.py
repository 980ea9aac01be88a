"""The rows of results.json: what is measured before, between and after the stages, each once."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize import data, launched, surgery
from linearize.config.schema import DataConfig, Recipe
from linearize.distill.memory import Fitting
from linearize.errors import (
    CheckpointError,
    DataError,
    LinearizeError,
    NotFiniteError,
    collected,
    raise_together,
)
from linearize.eval import ablation, harness, tables, task_files
from linearize.eval.perplexity import perplexity, windows
from linearize.mixers.offloaded import device_of
from linearize.progress import Meter
from linearize.storing import read_json, write_json

log = logging.getLogger(__name__)

DOUBTFUL = 1000.0
"""Perplexity of a teacher that reads nothing: its weights, its tokenizer and the text do not belong together."""


class Results:
    """Rows in the order they were measured, on disk after each one, so that a crash loses none.

    Args:
        path: results.json; an existing one is continued.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            remedy = f"Delete {path.name} and go on with --resume: what it held is measured again"
            rows = read_json(path, remedy).get("rows")
            found = (
                [tables.restored(row) for row in rows if isinstance(row, dict)]
                if isinstance(rows, list)
                else []
            )
            if rows is None or len(found) != len(rows) or not all(_is_row(row) for row in found):
                raise CheckpointError(f"{path}: its rows are no results. {remedy}")
            self.rows = found

    def __contains__(self, name: str) -> bool:
        return any(row["name"] == name for row in self.rows)

    def add(
        self,
        name: str,
        measure: Callable[[], dict[str, Any]],
        track: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        """Measure and write a row, unless an earlier run has; `track` takes it too, in the first process."""
        if name not in self:
            self.rows.append({"name": name, **measure()})
            if launched.first():
                write_json(self.path, {"rows": self.rows})
                track(self.rows[-1])


def _doubt(perplexities: dict[str, float]) -> None:
    """Say so where a teacher has nothing to teach."""
    lost = [f"{value:,.0f} on {name}" for name, value in perplexities.items() if value > DOUBTFUL]
    if lost:
        log.warning(
            "the teacher itself has a perplexity of %s: its weights, its tokenizer and the text do not belong "
            "together, and what is learned of it will be as wrong; see what it writes: `linearize generate MODEL`",
            " and ".join(lost),
        )


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    perplexities, tasks = row.get("perplexity", {}), row.get("tasks", {})
    if not isinstance(perplexities, dict) or not isinstance(tasks, dict):
        return False
    metrics = list(tasks.values())
    if not all(isinstance(found, dict) for found in metrics):
        return False
    numbers = [*perplexities.values(), *(number for found in metrics for number in found.values())]
    return all(type(number) in (int, float) for number in numbers)


class Measurer:
    """Perplexities and tasks of a recipe, with the texts read and cut once.

    Args:
        recipe: its `data.validation` and `eval`.
        tokenizer: the teacher's.
        autocast: dtype for the passes, or None for the model's own.
        errors: receives what texts and tasks are refused for, in place of raising the first.

    Attributes:
        texts: name -> windows [N, T].
        items: task -> checksum of its items.

    Raises:
        DataError: a text is missing or shorter than a window, or a task's file is missing; all before training.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Any,
        autocast: torch.dtype | None = None,
        errors: list[LinearizeError] | None = None,
    ) -> None:
        self.settings = recipe.eval
        self.fitting = Fitting(recipe.eval.batch_size, recipe.eval.length)
        self.tokenizer = tokenizer
        self.autocast = autocast
        self.texts: dict[str, Tensor] = {}
        self.items: dict[str, str] = {}
        wrong: list[LinearizeError] = [] if errors is None else errors
        with collected(wrong):
            self._read(data.HELD_OUT, recipe.data, tokenizer)
        for name, source in self.settings.texts.items():
            with collected(wrong):
                self._read(name, DataConfig(validation=source, text_field=recipe.data.text_field))
        if self.settings.tasks:
            with collected(wrong):
                given = (self.settings.tasks, self.settings.task_data, self.settings.task_limit)
                self.items = task_files.of_items(*given)
        if errors is None:
            raise_together(wrong, "evaluation")

    def measure(
        self, model: nn.Module, title: str, *, tasks: bool = True, sound: bool = True
    ) -> dict[str, Any]:
        """A row without its name: perplexity of every text and, if asked, every task.

        Args:
            model: the model.
            title: what is measured.
            tasks: also the tasks.
            sound: the model is one to go on with. One that lacks a part, or is untrained, may give NaN, and the row
                says so.

        Raises:
            NotFiniteError: a sound model gives NaN or infinity; names the text.
        """
        row: dict[str, Any] = {"perplexity": self.perplexities(model, title, sound=sound)}
        if title == ablation.TEACHER:
            _doubt(row["perplexity"])
        if tasks and self.settings.tasks:
            row["tasks"] = self.tasks(model)
        return row

    def perplexities(self, model: nn.Module, title: str, *, sound: bool = True) -> dict[str, float]:
        """Text -> perplexity; as `measure`."""
        values = {}
        with Meter(f"eval {title}", sum(cut.numel() for cut in self.texts.values())) as meter:
            for name, cut in self.texts.items():
                measured = partial(
                    perplexity, model, self.tokenizer, cut, meter=meter, autocast=self.autocast
                )
                try:
                    values[name] = self._fitting(model, measured).value
                except NotFiniteError as error:
                    if sound:
                        raise NotFiniteError(f"{title}, text '{name}': {error}") from error
                    values[name] = math.nan
        return values

    def tasks(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Task -> metric -> value."""
        measured = partial(
            harness.run_tasks,
            model,
            self.tokenizer,
            self.settings.tasks,
            data_dir=Path(self.settings.task_data),
            limit=self.settings.task_limit or None,
            autocast=self.autocast,
        )
        return self._fitting(model, measured)

    def _fitting(self, model: nn.Module, measured: Callable[..., Any]) -> Any:
        return self.fitting.run(lambda size: measured(batch_size=size), device_of(model))

    def ablations(self, model: nn.Module, results: Results) -> None:
        """Rows with a branch off and with untrained mixers; tasks only for the linear branch off."""
        labels = [ablation.UNTRAINED]
        if any(layer.mixer.has_both_branches for layer in surgery.converted(model)):
            labels = [ablation.NO_LINEAR, ablation.NO_WINDOW, *labels]
        if all(label in results for label in labels):
            return
        numbers = itertools.count(1)

        def measure() -> dict[str, Any]:
            return self.measure(model, f"ablation {next(numbers)}/{len(labels)}", tasks=False, sound=False)

        measured = ablation.ablate(model, measure, teacher=False)
        for label, row in measured.items():
            if label == ablation.NO_LINEAR and self.settings.tasks:
                with surgery.branch_off(model, "linear"):
                    row["tasks"] = self.tasks(model)
            results.add(label, partial(dict, row))

    def _read(self, name: str, text: DataConfig, tokenizer: Any = None) -> None:
        """Read and cut a text; its template, if it has one, by the tokenizer."""
        documents = data.validation_documents(text, tokenizer)
        try:
            self.texts[name] = windows(
                self.tokenizer,
                documents,
                window=self.settings.length,
                max_windows=self.settings.max_windows or None,
            )
        except DataError as error:
            raise DataError(f"evaluation text '{name}': {error}") from error
