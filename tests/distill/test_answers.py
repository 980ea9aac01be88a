"""A teacher's likeliest tokens are computed once, kept while their stage trains, and are what it learns from."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import several_jobs as jobs
from interrupted import at_step, crash, finals, press_ctrl_c
from several import run, start

from linearize import distill
from linearize.config.schema import Recipe, StageDataConfig
from linearize.config.semantics import problems
from linearize.distill import answers, placing, runner, stages
from linearize.errors import RecipeError, RunFolderError
from linearize.eval import harness

VOCABULARY = 259


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Adapters, then all weights, whose teacher is a copy."""
    for module in (runner.exporting, runner.gathering):
        monkeypatch.setattr(module, "checkpoint", lambda *given, **_: given[3].checkpoint)
    monkeypatch.setattr(runner, "write_report", lambda folder: folder)
    made = make_recipe(tokens=4 * 4 * 64, batch_size=4)
    lora = replace(made.stages["recover"].lora, dropout=0.0)
    first = replace(made.stages["recover"], lora=lora)
    second = replace(first, train=["all"], lora=None, objective={"logits_kl": 1.0})
    return replace(made, stages={"recover": first, "whole": second}, eval=replace(made.eval, ablations=False))


def keeping(recipe: Recipe, count: int) -> Recipe:
    changed = {name: replace(stage, top_k=count) for name, stage in recipe.stages.items()}
    return replace(recipe, stages=changed)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_all_tokens_are_what_no_files_are(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    distill.run(str(teacher_folder), recipe, tmp_path / "dense")
    distill.run(str(teacher_folder), keeping(recipe, VOCABULARY), tmp_path / "all")
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "dense"), rel=1e-4)
    distill.run(str(teacher_folder), keeping(recipe, 8), tmp_path / "few")
    few, dense = losses(tmp_path / "few"), losses(tmp_path / "dense")
    assert few[4] < dense[4] and few != pytest.approx(dense, rel=1e-2)
    for out in ("all", "few"):
        assert not list((tmp_path / out).rglob(answers.FOLDER))


def test_a_stage_that_goes_on(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that are there are not asked for again, and the teacher is not loaded."""
    asked = keeping(recipe, 8)
    distill.run(str(teacher_folder), asked, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, "whole", 2, press_ctrl_c)
        with pytest.raises(runner.RunStopped):
            distill.run(str(teacher_folder), asked, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(placing.Place, "original", crash)
        patch.setattr(stages, "predict_teacher", crash)
        distill.run(str(teacher_folder), asked, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_damaged_answers_are_computed_again(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = keeping(recipe, 8)
    with monkeypatch.context() as patch:
        at_step(patch, "recover", 1, press_ctrl_c)
        with pytest.raises(runner.RunStopped):
            distill.run(str(teacher_folder), asked, tmp_path / "run")
    file = tmp_path / "run" / "stage-1-recover" / answers.FOLDER / "log_probs.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    distill.run(str(teacher_folder), asked, tmp_path / "run", resume=True)
    distill.run(str(teacher_folder), asked, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_text_that_has_changed_is_told(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run does not go on with another text, and old answers are not taken for those to a new one."""
    asked, out = keeping(recipe, 8), tmp_path / "run"
    text = Path(asked.data.source)
    before = text.read_text()
    with monkeypatch.context() as patch:
        at_step(patch, "recover", 2, press_ctrl_c)
        with pytest.raises(runner.RunStopped):
            distill.run(str(teacher_folder), asked, out)
    text.write_text(before.replace("miller", "farmer"))
    changed = r"another text: that of stages.recover, stages.whole, eval: held-out has changed since"
    with pytest.raises(RunFolderError, match=changed):
        distill.run(str(teacher_folder), asked, out, resume=True)
    times: list[int] = []
    with monkeypatch.context() as patch:
        os.remove(out / "environment.json")  # the way out that the message names
        tell = stages.predict_teacher
        patch.setattr(stages, "predict_teacher", lambda *given: times.append(1) or tell(*given))
        at_step(patch, "recover", 3, press_ctrl_c)
        with pytest.raises(runner.RunStopped):
            distill.run(str(teacher_folder), asked, out, resume=True)
    assert times
    text.write_text(before)
    with pytest.raises(RunFolderError, match="another text"):
        distill.run(str(teacher_folder), asked, out, resume=True)


def test_items_that_have_changed_are_told(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one results.json are of the same items of a task."""
    pytest.importorskip("lm_eval")
    scored = replace(recipe.eval, tasks=["lambada_openai"], task_data=str(tmp_path), task_limit=1)
    asked, out = replace(recipe, eval=scored), tmp_path / "run"
    file = tmp_path / "lambada_openai.jsonl"
    before = '{"context": "the cat sat on the", "continuation": "mat"}\n'
    file.write_text(before)
    with monkeypatch.context() as patch, pytest.raises(runner.RunStopped):
        patch.setattr(harness, "run_tasks", lambda *x, **y: {"lambada_openai": {"acc": 0.5}})
        at_step(patch, "recover", 2, press_ctrl_c)
        distill.run(str(teacher_folder), asked, out)
    file.write_text(before.replace("mat", "tree"))
    with pytest.raises(RunFolderError, match=r"that of eval\.tasks: lambada_openai has changed since"):
        distill.run(str(teacher_folder), asked, out, resume=True)
    file.write_text(before * 2)  # behind the limit: not read
    with monkeypatch.context() as patch, pytest.raises(runner.RunStopped):
        at_step(patch, "recover", 3, press_ctrl_c)
        distill.run(str(teacher_folder), asked, out, resume=True)


@pytest.mark.parametrize("shard", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_several_processes(shard: str, teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Each answers a part of the text, and all read all of it."""
    asked = keeping(replace(recipe, run=replace(recipe.run, precision="fp32")), 8)
    distill.run(str(teacher_folder), asked, tmp_path / "one")
    several: Any = replace(asked, run=replace(asked.run, shard=shard))
    given = (str(teacher_folder), several, tmp_path / "run", signal.SIGTERM, 1, ("whole", 1), False)
    ended = start(2, jobs.signalled, *given, folder=tmp_path / "a")
    assert ended.codes == [143, 143], ended.said
    ended = start(2, run, str(teacher_folder), several, tmp_path / "run", True, folder=tmp_path / "b")
    assert ended.codes == [0, 0], ended.said
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    assert finals(tmp_path / "run").keys() == finals(tmp_path / "one").keys()


def test_refusals(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    stage = replace(recipe.stages["whole"], top_k=8)
    plain = replace(recipe, stages={"whole": replace(stage, objective={"next_token": 1.0})})
    assert any("stages.whole.top_k: is of logits_kl" in problem for problem in problems(plain))
    growing = replace(stage, data=StageDataConfig(length=[32, 64]), batch_size=2)
    assert any(
        "top_k: the teacher answers whole sequences" in x
        for x in problems(replace(recipe, stages={"a": growing}))
    )
    wide = replace(recipe, stages={"whole": replace(stage, top_k=260)})
    with pytest.raises(RecipeError, match=r"stages.whole.top_k: 260 is more than the 259 tokens"):
        distill.run(str(teacher_folder), wide, tmp_path / "run")
    assert not (tmp_path / "run").exists()
