"""The rows of results.json: what is measured before, between and after the stages, each once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize import data, surgery
from linearize.config.schema import DataConfig, Recipe
from linearize.distill.checkpoint import read_json, write_json
from linearize.distill.memory import Fitting
from linearize.errors import CheckpointError, DataError
from linearize.eval import ablation, harness
from linearize.eval.perplexity import perplexity, windows
from linearize.mixers.offloaded import device_of
from linearize.progress import Meter

VALIDATION = "held-out"
"""Name of the text of data.validation in tables."""


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
            if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
                raise CheckpointError(f"{path}: its rows are no results. {remedy}")
            self.rows = rows

    def __contains__(self, name: str) -> bool:
        return any(row["name"] == name for row in self.rows)

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure and write a row, unless an earlier run has."""
        if name not in self:
            self.rows.append({"name": name, **measure()})
            write_json(self.path, {"rows": self.rows})


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

    Raises:
        DataError: a text is missing or shorter than a window, or a task's file is missing; all before training.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, autocast: torch.dtype | None = None) -> None:
        self.settings = recipe.eval
        self.fitting = Fitting(recipe.eval.batch_size, recipe.eval.length)
        self.tokenizer = tokenizer
        self.autocast = autocast
        self.texts: dict[str, Tensor] = {
            VALIDATION: self._cut(VALIDATION, data.validation_documents(recipe.data, tokenizer))
        }
        for name, source in self.settings.texts.items():
            documents = data.validation_documents(
                DataConfig(validation=source, text_field=recipe.data.text_field)
            )
            self.texts[name] = self._cut(name, documents)
        if self.settings.tasks:
            harness.check_data(self.settings.tasks, self.settings.task_data, self.settings.task_limit)

    def measure(self, model: nn.Module, title: str, *, tasks: bool = True) -> dict[str, Any]:
        """A row without its name: perplexity of every text and, if asked, every task."""
        row: dict[str, Any] = {"perplexity": self.perplexities(model, title)}
        if tasks and self.settings.tasks:
            row["tasks"] = self.tasks(model)
        return row

    def perplexities(self, model: nn.Module, title: str) -> dict[str, float]:
        """Text -> perplexity."""
        values = {}
        with Meter(f"eval {title}", sum(cut.numel() for cut in self.texts.values())) as meter:
            for name, cut in self.texts.items():
                measured = partial(
                    perplexity, model, self.tokenizer, cut, meter=meter, autocast=self.autocast
                )
                values[name] = self._fitting(model, measured).value
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
            return self.measure(model, f"ablation {next(numbers)}/{len(labels)}", tasks=False)

        measured = ablation.ablate(model, measure, teacher=False)
        for label, row in measured.items():
            if label == ablation.NO_LINEAR and self.settings.tasks:
                with surgery.branch_off(model, "linear"):
                    row["tasks"] = self.tasks(model)
            results.add(label, partial(dict, row))

    def _cut(self, name: str, texts: list[data.Document]) -> Tensor:
        try:
            return windows(
                self.tokenizer,
                texts,
                window=self.settings.length,
                max_windows=self.settings.max_windows or None,
            )
        except DataError as error:
            raise DataError(f"evaluation text '{name}': {error}") from error
