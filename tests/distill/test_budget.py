"""A run with a budget: measured once, scaled, written down, and found again where it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from interrupted import Crash, at_step, crash

from linearize import distill
from linearize.config import compose
from linearize.config.budget import parse, whole
from linearize.config.schema import Recipe
from linearize.distill import budgeting, rates
from linearize.distill.rates import Timing
from linearize.errors import LinearizeError, RecipeError, RunFolderError

QUICK = {"transfer": Timing(1e-5, 1.0, 0.5), "recover": Timing(4e-5, 2.0, 0.5)}


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    made = make_recipe(save_every=4)
    made.eval.ablations = False
    return made


def test_a_time_becomes_the_tokens_that_end_within_it(recipe: Recipe) -> None:
    made, facts = budgeting.fitted(recipe, parse("5m"), cuda=False, measure=lambda _: QUICK)
    seconds = sum(QUICK[name].seconds(stage, 64) for name, stage in made.stages.items())
    assert 0.9 * 285 < seconds <= 285 == 0.95 * 300
    assert facts["planned_seconds"] == round(seconds, 1) and facts["given"] == "5m"
    assert made.stages["transfer"].tokens == pytest.approx(made.stages["recover"].tokens, rel=0.01)


def test_steps_that_were_timed_in_another_size_are_timed_again(recipe: Recipe) -> None:
    recipe.data.length = 512
    seen = []

    def measure(timed: Recipe) -> dict[str, Timing]:
        seen.append(timed.stages["transfer"].batch_size)
        return {name: Timing(1e-6, 0.0, 0.0) for name in timed.stages}

    made, _ = budgeting.fitted(recipe, parse("1h"), cuda=True, measure=measure)
    assert seen == [2, made.stages["transfer"].batch_size] and seen[1] > 8


def test_a_time_too_short_says_what_would_do(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"--budget 3s: .* give \d+s or more"):
        budgeting.fitted(recipe, parse("3s"), cuda=False, measure=lambda _: QUICK)


def test_every_stage_is_timed_as_it_trains(teacher_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    found = rates.measured(
        str(teacher_folder), recipe, device=torch.device("cpu"), autocast=None, weights=torch.float32, folder=tmp_path
    )  # fmt: skip
    assert list(found) == ["transfer", "recover"]
    assert all(0 < timing.token < 0.1 and timing.save > 0 for timing in found.values())
    assert not list(tmp_path.iterdir()) or [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_run_holds_its_scaled_recipe_and_goes_on_without_measuring(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "run", whole(recipe)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(
            rates, "measured", lambda *_, **__: dict.fromkeys(recipe.stages, Timing(1e-3, 0.1, 0.1))
        )
        at_step(patch, "recover", 2, crash)
        distill.run(str(teacher_folder), recipe, out, budget=parse("1s"))
    facts = json.loads((out / "environment.json").read_text())["budget"]
    written = compose(out / "recipe.yaml")
    assert facts["given"] == "1s" and set(facts["timed"]) == {"transfer", "recover"}
    assert whole(written) < begun == whole(recipe)

    monkeypatch.setattr(rates, "measured", lambda *_, **__: pytest.fail("measured again"))
    run = partial(distill.run, str(teacher_folder), recipe, out)
    for other, said in (
        ("3s", "holds a run of --budget 1s, not 3s"),
        (None, "holds a run of another recipe"),
    ):
        with pytest.raises(RunFolderError, match=said):
            run(resume=True, budget=parse(other) if other else None)
    with pytest.raises(RunFolderError, match="go on with --resume"):
        run(budget=parse("1s"))
    recipe.stages["recover"].lr *= 2
    with pytest.raises(RunFolderError, match=r"stages.recover.lr"):
        run(resume=True, budget=parse("1s"))
    recipe.stages["recover"].lr /= 2
    run(resume=True, budget=parse("1s"))
    assert compose(out / "recipe.yaml") == written
    assert json.loads((out / "environment.json").read_text())["budget"] == facts
    done = [json.loads(path.read_text())["tokens"] for path in sorted(out.glob("stage-*/done.json"))]
    assert sum(done) <= whole(written)
    with pytest.raises(RunFolderError, match="holds a run that has ended"):
        run(resume=True, budget=parse("1s"))


def test_what_is_wrong_is_told_before_anything_is_timed(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "measured", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(RecipeError, match="less than one sequence"):
        distill.run(str(teacher_folder), recipe, tmp_path / "run", budget=parse("10-tokens"))
    recipe.data.source = str(tmp_path / "missing.txt")
    with pytest.raises(LinearizeError, match=r"missing\.txt"):
        distill.run(str(teacher_folder), recipe, tmp_path / "run", budget=parse("10s"))
    assert not (tmp_path / "run").exists()
