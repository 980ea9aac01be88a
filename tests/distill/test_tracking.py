"""Trackers get the numbers of the file; one that fails costs a word; a trace is written where it is asked for."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from linearize import distill
from linearize.config import rules, to_yaml
from linearize.config.schema import Recipe
from linearize.config.semantics import problems
from linearize.distill import runner, tracking
from linearize.errors import RecipeError


class Recorder(GeneralTracker):
    """Keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False
    seen: ClassVar[list[tuple[int, dict[str, Any]]]] = []
    ended: ClassVar[list[str]] = []

    def __init__(self, project: str, **given: Any) -> None:
        super().__init__()
        self.project = project

    @property
    def tracker(self) -> Any:
        return self.seen

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.seen.append((step, values))

    def finish(self) -> None:
        self.ended.append(self.project)


class Broken(Recorder):
    name = "broken"

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        raise ConnectionError("nobody answers")


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(runner.exporting, "checkpoint", lambda *given, **_: given[3].checkpoint)
    monkeypatch.setattr(runner, "write_report", lambda folder: folder)
    for cls in (Recorder, Broken):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, cls.name, cls)
    Recorder.seen.clear()
    Recorder.ended.clear()
    whole = make_recipe(tokens=3 * 2 * 64)
    return replace(whole, eval=replace(whole.eval, ablations=False))


def running(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, run=replace(recipe.run, **changes))


def test_the_lines_of_the_file(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps go on from stage to stage; one tracker that fails leaves the other alone."""
    with caplog.at_level(logging.WARNING):
        distill.run(str(teacher_folder), running(recipe, trackers=["broken", "recorder"]), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [
        (step, values) for step, values in Recorder.seen if not any("perplexity" in key for key in values)
    ]
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
    for (_, values), line in zip(found, lines, strict=True):
        assert values[f"{line['stage']}/loss"] == line["loss"]
        assert values[f"{line['stage']}/grad_norm"] == line["grad_norm"]
    assert found[0][1]["transfer/layers/1"] == lines[0]["layers"][1]
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    measured = [values for _, values in Recorder.seen if any("perplexity" in key for key in values)]
    assert measured[0] == {f"teacher/perplexity/{k}": v for k, v in rows[0]["perplexity"].items()}
    assert measured[-1] == {f"eval/perplexity/{k}": v for k, v in rows[-1]["perplexity"].items()}
    assert Recorder.seen[-1][0] == 6
    assert Recorder.ended == [tracking.PROJECT]
    assert caplog.text.count("broken is let go, the run goes on: ConnectionError: nobody answers") == 1


def test_what_may_be_asked_for(recipe: Recipe) -> None:
    assert set(rules.TRACKERS) == LOGGER_TYPE_TO_CLASS.keys() - {"recorder", "broken"}
    for asked, words in (
        ("tensorbord", "run.trackers: unknown 'tensorbord': did you mean 'tensorboard'?"),
        ([], "run.trackers: must be auto, none, or names"),
        (7, "run.trackers: must be auto, none, or names"),
    ):
        assert any(words in problem for problem in problems(running(recipe, trackers=asked))), asked
    assert not problems(running(recipe, trackers=["wandb", "trackio"]))


def test_what_is_not_installed(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run.trackers: clearml is not installed: pip install clearml"):
        distill.run(str(teacher_folder), running(recipe, trackers="clearml"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distill.run(str(teacher_folder), recipe, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [event.value for event in events.Scalars("transfer/loss")]
    assert found == pytest.approx([line["loss"] for line in lines if line["stage"] == "transfer"])


def test_a_trace(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    distill.run(str(teacher_folder), running(recipe, profile=True, trackers="none"), tmp_path / "run")
    for stage in ("transfer", "recover"):
        events = json.loads((tmp_path / "run" / f"trace-{stage}.json").read_text())["traceEvents"]
        assert any(event.get("name") == "aten::mm" for event in events)
        assert sum("Optimizer.step" in str(event.get("name")) for event in events) == 3
    assert not Recorder.seen


@pytest.mark.slow
def test_wandb_and_trackio_themselves(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Both at once, without a network, where they are installed; each has its numbers on the disk."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(to_yaml(running(recipe, trackers=["wandb", "trackio"])))
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "linearize", "run", str(teacher_folder), str(path), "--out", str(out)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, env=os.environ | places
    )
    assert ended.returncode == 0 and "is let go" not in ended.stderr, ended.stderr[-3000:]
    assert len([*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]) == 1
    [database] = tmp_path.glob("trackio/*.db")
    with closing(sqlite3.connect(database)) as connection:
        [(count,)] = connection.execute("select count(*) from metrics")
    assert count >= 6, "a line a step, and the measurements"
