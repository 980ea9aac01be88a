"""Several processes train what one trains: the same losses, the same weights, stopped and resumed on any number."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import several_jobs as jobs
import torch
from several import lines, run, start, whole
from several_recipes import STEPS, assert_equal, enough_cards, once

from linearize import storing
from linearize.config.schema import CalibrateConfig, Recipe, StageConfig
from linearize.distill.lock import held


@pytest.fixture(autouse=True)
def as_many_cards(request: pytest.FixtureRequest) -> None:
    enough_cards(request)


@pytest.fixture
def recipe(every_stage: Recipe) -> Recipe:
    return every_stage


@pytest.fixture
def reference(of_one_process: Path) -> Path:
    return of_one_process


@pytest.fixture
def transfer(recipe: Recipe) -> Recipe:
    """The first stage alone."""
    stages = {"transfer": recipe.stages["transfer"]}
    return Recipe(**{**vars(recipe), "stages": stages, "calibrate": CalibrateConfig(tokens=0)})


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_kind_of_stage(
    size: int, teacher_folder: Path, recipe: Recipe, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ended = start(size, whole, str(teacher_folder), recipe, out, folder=tmp_path)
    assert ended.codes == [0] * size, ended.said
    assert_equal(out, reference)
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (out, reference)]
    assert [row["name"] for row in rows[0]] == [row["name"] for row in rows[1]]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)
    assert json.loads((out / "environment.json").read_text())["processes"] == size
    assert ended.said.count("stage 1/4 transfer 100%") == 1
    assert (out / "checkpoint" / "model.safetensors").is_file() and (out / "report.md").is_file()


@pytest.mark.processes(3)
def test_stopped_and_resumed_on_other_numbers(
    teacher_folder: Path, recipe: Recipe, reference: Path, tmp_path: Path
) -> None:
    """SIGTERM to one of two, Ctrl-C in one of three (of which one has two sequences of four), then one to the end."""
    out, model = tmp_path / "run", str(teacher_folder)
    given = (model, recipe, out, signal.SIGTERM, 1, ("transfer", 2), False)
    ended = start(2, jobs.signalled, *given, folder=tmp_path / "a")
    assert ended.codes == [143, 143], ended.said
    once(ended, "stopped in stage 'transfer' after step 3 of 4")
    assert (
        f"torchrun --nproc-per-node 2 -m linearize run {model} {out}/recipe.yaml --out {out} --resume"
        in ended.said
    )
    given = (model, recipe, out, signal.SIGINT, 0, ("recover", 2), True)
    ended = start(3, jobs.signalled, *given, folder=tmp_path / "b")
    assert ended.codes == [130] * 3, ended.said
    once(ended, "stopped in stage 'recover' after step 3 of 4")
    assert storing.latest(out / "stage-2-recover").name == "checkpoint-3"
    ended = start(1, run, model, recipe, out, True, folder=tmp_path / "c")
    assert ended.codes == [0], ended.said
    assert_equal(out, reference)


@pytest.mark.slow
def test_ctrl_c_that_a_launcher_hands_on(teacher_folder: Path, transfer: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = start(2, jobs.pressed_twice, str(teacher_folder), transfer, out, folder=tmp_path)
    assert ended.codes == [130, 130], ended.said
    once(ended, "stopped in stage 'transfer' after step 3 of 4")
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process(
    rank: int, teacher_folder: Path, transfer: Recipe, reference: Path, tmp_path: Path
) -> None:
    """The other one ends at once with the command that goes on, which does."""
    out, model = tmp_path / "run", str(teacher_folder)
    given = (model, transfer, out, signal.SIGKILL, rank, ("transfer", 3), False)
    ended = start(2, jobs.signalled, *given, folder=tmp_path)
    assert ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] == 2, ended.said
    once(ended, "another process of this run has ended, or does not answer")
    once(ended, "Go on with:\n  torchrun --nproc-per-node 2 -m linearize run")
    assert storing.latest(out / "stage-1-transfer").name == "checkpoint-2"
    ended = start(2, run, model, transfer, out, True, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said
    assert [x["step"] for x in lines(out)] == list(range(1, STEPS + 1))


def test_a_process_that_waits_on_its_card(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    """For one that is gone: no error comes out of such a wait, and it ends all the same."""
    stages = {"recover": recipe.stages["recover"]}
    few = Recipe(**{**vars(recipe), "stages": stages, "calibrate": CalibrateConfig(tokens=0)})
    ended = start(2, jobs.waiting_on_a_card, str(teacher_folder), few, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2, -signal.SIGKILL], ended.said
    once(ended, "another process of this run has ended, or does not answer (its connection was closed)")
    once(ended, "Go on with:\n  torchrun --nproc-per-node 2 -m linearize run")


def test_not_finite_in_one_process(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Nobody applies the step."""
    stages = {"recover": recipe.stages["recover"]}
    few = Recipe(**{**vars(recipe), "stages": stages, "calibrate": CalibrateConfig(tokens=0)})
    ended = start(2, jobs.not_finite, str(teacher_folder), few, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2, 2], ended.said
    once(ended, "stage 'recover', step 3: the gradient of")
    once(ended, "The step was not applied")


@pytest.mark.slow
def test_out_of_memory_in_one_process(teacher_folder: Path, transfer: Recipe, tmp_path: Path) -> None:
    """All go on with what fits there, and the losses stay what they are."""
    transfer.stages = {
        "transfer": StageConfig(**{**vars(transfer.stages["transfer"]), "micro_batch": "auto"})
    }
    sound, out = tmp_path / "sound", tmp_path / "run"
    assert start(2, run, str(teacher_folder), transfer, sound, folder=tmp_path).codes == [0, 0]
    ended = start(2, jobs.out_of_memory, str(teacher_folder), transfer, out, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said
    assert [(tmp_path / f"sizes-{rank}.txt").read_text() for rank in (0, 1)] == ["1", "1"]
    losses = [[x["loss"] for x in lines(folder)] for folder in (sound, out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_first_process_fails_alone(teacher_folder: Path, transfer: Recipe, tmp_path: Path) -> None:
    ended = start(2, jobs.failing_first, str(teacher_folder), transfer, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2, 2]
    once(ended, "the text is upside down")


@pytest.mark.processes(3)
def test_refusals_are_said_once(teacher_folder: Path, transfer: Recipe, tmp_path: Path) -> None:
    small = StageConfig(**{**vars(transfer.stages["transfer"]), "batch_size": 2})
    few = Recipe(**{**vars(transfer), "stages": {"transfer": small}})
    ended = start(3, run, str(teacher_folder), few, tmp_path / "few", folder=tmp_path)
    assert ended.codes == [2] * 3
    once(
        ended,
        "stages.transfer.batch_size: a step of 2 sequences cannot be shared by 3 processes: start at most 2",
    )
    assert not (tmp_path / "few").exists()
    with held(tmp_path / "held"):
        ended = start(2, run, str(teacher_folder), transfer, tmp_path / "held", folder=tmp_path)
    assert ended.codes == [2, 2]
    once(ended, "is in use by process")


def test_a_budget_of_time(teacher_folder: Path, transfer: Recipe, tmp_path: Path) -> None:
    """The first process's clock decides for both, whose steps it times together."""
    transfer.run = replace(transfer.run, compile="never")
    ended = start(2, jobs.in_a_time, str(teacher_folder), transfer, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [130, 130], ended.said
    plans = [json.loads((tmp_path / f"planned-{rank}.json").read_text()) for rank in (0, 1)]
    assert plans[0] == plans[1]
    assert 0 < plans[0]["seconds"] <= jobs.SECONDS


def test_a_budget_of_time_in_shards(teacher_folder: Path, transfer: Recipe, tmp_path: Path) -> None:
    transfer.run = replace(transfer.run, shard="full")
    ended = start(2, jobs.in_a_time, str(teacher_folder), transfer, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2, 2]
    once(ended, f"--budget {jobs.SECONDS}s: a time is measured with whole weights")


def test_gradients_of_some_processes_alone(tmp_path: Path) -> None:
    ended = start(2, jobs.experts, tmp_path, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said
    drawn = [(tmp_path / f"drawn-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert len({*drawn[0], *drawn[1]}) == 4


def test_a_step_is_read_once(make_recipe: Callable[..., Recipe]) -> None:
    """Shares of any number of processes, one after the other, are the batch of one."""
    from linearize.config.course import Course
    from linearize.distill.batches import Batches

    stage = StageConfig(objective={"next_token": 1.0}, tokens=16 * 40, batch_size=[4, 7])
    data = [{"input_ids": torch.tensor([n])} for n in range(9)]
    course = Course.of(stage, 16)
    whole = Batches(data, course, 3)
    for shares in (2, 3, 4):
        parts = Batches(data, course, 3, shares)
        assert len(parts) == shares * len(whole)
        for step in range(len(whole)):
            seen = torch.cat([parts[step * shares + rank]["input_ids"] for rank in range(shares)])
            assert torch.equal(seen, whole[step]["input_ids"])
