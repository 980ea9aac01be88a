"""A stage whose values change as it goes on: its steps, its batches, its rates, and a resume in the middle."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import Crash, at_step, crash, finals, losses

from linearize import distill, storing
from linearize.config.course import Course, Phase
from linearize.config.schedule import Over
from linearize.config.schema import Recipe, StageConfig, StageDataConfig
from linearize.data.echo import Echoed
from linearize.data.packing import LOSS, START, PackedDataset
from linearize.distill.batches import Batches, firsts
from linearize.distill.optimizer import Rate
from linearize.eval import plots


@pytest.fixture(scope="module")
def unrendered() -> None:
    """Here the pictures are rendered."""


def course(tokens: int, batch: Any = 2, length: Any = 8) -> Course:
    return Course.planned(tokens, Over.of(batch), Over.of(length))


def rates(steps: int, **fields: Any) -> list[float]:
    rate = Rate(StageConfig(**fields), course(steps * 16))
    return [rate(step) for step in range(steps)]


def test_a_budget_in_whole_steps() -> None:
    assert course(1000, 6, 10) == Course((Phase(0, 16, 6, 10, 0),), 1000)
    assert course(1, 2, 10).steps == 1
    assert Course.of(StageConfig(tokens=1000, batch_size=6), 10).tokens == 960


def test_phases_follow_each_other() -> None:
    made = course(640, [[0, 2], [0.5, 4]], [8, 16])
    assert made.phases == (Phase(0, 20, 2, 8, 0), Phase(20, 5, 4, 16, 320))
    assert (made.steps, made.tokens, made.longest, made.shapes) == (25, 640, 16, [(2, 8), (4, 16)])
    assert [made.trained(step) for step in (0, 3, 20, 22, 25)] == [0, 48, 320, 448, 640]
    by_step = course(1000, [[0, 1], [3, 2], [5, 4]], 10)
    assert [(x.first, x.steps, x.batch) for x in by_step.phases] == [(0, 3, 1), (3, 2, 2), (5, 23, 4)]
    # a part that no whole step begins in is passed over
    assert course(64, [[0, 2], [0.4, 3], [0.45, 4]]).shapes == [(2, 8), (4, 8)]


@pytest.mark.parametrize("batch", [3, [1, 2, 4], [[0, 2], [7, 5]]])
@pytest.mark.parametrize("length", [4, [4, 8], [[0, 8], [0.3, 2], [0.6, 4]]])
@pytest.mark.parametrize("tokens", [7, 100, 999])
def test_phases_are_what_a_walk_step_by_step_gives(batch: Any, length: Any, tokens: int) -> None:
    made, step, trained = course(tokens, batch, length), 0, 0
    while True:
        phase = made.phase(step)
        place = (step, trained, tokens)
        assert made.trained(step) == trained
        if step < made.steps:
            assert (phase.batch, phase.length) == (Over.of(batch).at(*place), Over.of(length).at(*place))
        size = Over.of(batch).at(*place) * Over.of(length).at(*place)
        if step and trained + size > tokens:
            break
        step, trained = step + 1, trained + size
    assert made.steps == step


def numbered(count: int, length: int) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.arange(length) + index * length, "position_ids": torch.arange(length),
         "labels": torch.arange(length) + index * length}
        for index in range(count)
    ]  # fmt: skip


def test_batches_are_a_function_of_the_step() -> None:
    batches = Batches(numbered(5, 8), course(16 * 8), seed=3)
    steps = [batches[step]["input_ids"] for step in range(len(batches))]
    order = torch.cat(steps)[:, 0] // 8
    assert order[:5].tolist() == [0, 1, 2, 3, 4]
    assert sorted(order[5:10].tolist()) == [0, 1, 2, 3, 4]
    assert order[5:10].tolist() != order[10:15].tolist()
    again = Batches(numbered(5, 8), course(16 * 8), seed=3)
    for step in reversed(range(len(again))):
        assert torch.equal(again[step]["input_ids"], steps[step])


def test_shorter_sequences_are_cut_from_the_longest() -> None:
    """Text goes on from sequence to sequence; a longer phase begins with a whole one."""
    made = course(8 * 5 + 16 * 4, [[0, 1], [5, 2]], [[0, 8], [5, 16]])
    assert made.shapes == [(1, 8), (2, 16)] and firsts(made) == [0, 3, 7]
    batches = Batches(numbered(8, 16), made, seed=0)
    short = torch.cat([batches[step]["input_ids"] for step in range(5)])
    assert torch.equal(short, torch.arange(40).view(5, 8))
    assert torch.equal(batches[5]["input_ids"], torch.arange(48, 80).view(2, 16))
    assert batches[0]["labels"].tolist() == [[-100, *range(1, 8)]]
    assert batches[1]["labels"].tolist() == [[-100, *range(9, 16)]]
    assert batches[1]["position_ids"].tolist() == [list(range(8))]


@pytest.mark.parametrize("boundaries", [True, False])
def test_a_cut_sequence_is_one_packed_at_that_length(boundaries: bool) -> None:
    tokens = np.arange(64, dtype=np.int32)
    flags = np.full(64, LOSS, dtype=np.uint8)
    flags[[0, 3, 16, 29, 30, 50]] |= START
    flags[5:9] = 0
    long, short = (PackedDataset(tokens, flags, length=length, boundaries=boundaries) for length in (32, 8))
    made = course(64 + 32, [[0, 1], [8, 1]], [[0, 8], [8, 32]])
    batches = Batches(long, made, seed=0)
    for step in range(8):
        for key, value in batches[step].items():
            assert torch.equal(value[0], short[step][key]), (step, key)


def test_passages_come_again_within_what_is_cut() -> None:
    """A copy of what another stretch of the row holds is a passage from nowhere."""
    made = course(64 * 24 + 256 * 4, [[0, 1], [24, 1]], [[0, 64], [24, 256]])
    batches = Batches(Echoed(numbered(5, 256), share=1.0, seed=1), made, seed=0)
    changed = 0
    for step in range(made.steps):
        ids = batches[step]["input_ids"][0].tolist()
        assert torch.equal(batches[step]["input_ids"], batches[step]["input_ids"])
        strange = [place for place, token in enumerate(ids) if token != ids[0] + place]
        assert all(ids[place] in ids[:place] for place in strange), step
        changed += len(strange)
    assert changed > 0.15 * made.tokens


def test_the_rate_warms_up_and_ends_at_its_minimum() -> None:
    values = rates(100, warmup_ratio=0.1, min_lr_ratio=0.2)
    assert values[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert values[10] == 1.0
    assert values[99] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert rates(1, warmup_ratio=0.0) == [1.0]


def test_other_courses_of_the_rate() -> None:
    flat = rates(20, lr_schedule="constant", warmup_ratio=0.1)
    assert flat == pytest.approx([1 / 3, 2 / 3, *18 * [1.0]])
    wsd = rates(20, lr_schedule="wsd", warmup_ratio=0.1, decay_ratio=0.25, min_lr_ratio=0.0)
    assert wsd == pytest.approx([1 / 3, 2 / 3, *13 * [1.0], 0.8, 0.6, 0.4, 0.2, 0.0])
    steps = rates(10, lr_schedule=[[0, 1.0], [0.5, 0.1], [0.8, 0.01]], warmup_ratio=0.1)
    assert steps == pytest.approx([0.5, *4 * [1.0], *3 * [0.1], *2 * [0.01]])
    assert rates(4, lr_schedule=[[0, 1.0], [3, 0.5]], warmup_ratio=0.0) == [1.0, 1.0, 1.0, 0.5]


@pytest.fixture
def changing(make_recipe: Callable[..., Recipe]) -> Recipe:
    """Everything that may change does, in both kinds of stages."""
    recipe = make_recipe(
        tokens=5 * 2 * 32 + 3 * 4 * 64, batch_size=[[0, 2], [5, 4]], save_every=2, log_every=1,
        lr_schedule=[1.0, 0.5, 0.1], data=StageDataConfig(length=[[0, 32], [5, 64]]),
    )  # fmt: skip
    window = {**recipe.mixer["window"], "overlap": True}
    recipe.mixer = {**recipe.mixer, "window": window, "combine": {"name": "weighted"}}
    for stage in recipe.stages.values():
        stage.window_dropout = [[0, 0.9], [0.3, 0.5], [0.6, 0.0]]
    recipe.eval.ablations = False
    return recipe


def test_a_resume_in_the_middle_of_a_schedule_is_bit_equal(
    teacher_folder: Path, changing: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before and behind the step at which length and batch change."""
    distill.run(str(teacher_folder), changing, tmp_path / "whole")
    out = tmp_path / "run"
    for stage, step, last in (("transfer", 4, 2), ("transfer", 8, 6), ("recover", 6, 4)):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            at_step(patch, stage, step, crash)
            distill.run(str(teacher_folder), changing, out, resume=True)
        assert storing.latest(next(out.glob(f"stage-*-{stage}"))).name == f"checkpoint-{last}"
        torch.manual_seed(7)
    distill.run(str(teacher_folder), changing, out, resume=True)
    assert losses(out) == losses(tmp_path / "whole")
    expected, found = finals(tmp_path / "whole"), finals(out)
    for name, tensors in expected.items():
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in tensors.items()), name


def test_a_picture_only_where_something_changes(tmp_path: Path) -> None:
    lines = [{"stage": "transfer", "tokens": 10 * i, "lr": 0.1 * i, "loss": 1.0} for i in range(3)]
    assert plots.schedules(lines, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
    lines.append({"stage": "recover", "tokens": 5, "lr": 0.1, "window_dropout": 0.5})
    assert plots.schedules(lines, tmp_path / "some.png") == tmp_path / "some.png"


def test_the_report_tells_what_changed(teacher_folder: Path, changing: Recipe, tmp_path: Path) -> None:
    distill.run(str(teacher_folder), changing, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = [line for line in lines if line["stage"] == "transfer"]
    assert [line["batch_size"] for line in first] == 5 * [2] + 3 * [4]
    assert [line["length"] for line in first] == 5 * [32] + 3 * [64]
    assert [line["tokens"] for line in first] == [*range(64, 321, 64), 576, 832, 1088]
    assert {line["window_dropout"] for line in first} == {0.9, 0.5, 0.0}
    assert [line["lr"] for line in first][-1] == pytest.approx(1e-3)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "batch_size 2, 4; length 32, 64; window_dropout 0.9, 0.5, 0" in report
    assert (tmp_path / "run" / "schedule.png").is_file() and "schedule.png" in report
