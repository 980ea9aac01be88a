"""The stages of every recipe in two processes: the losses and the weights of one."""

from __future__ import annotations

from pathlib import Path

import covering
import pytest
import several_jobs
import torch
from byte_llama import TEXT
from interrupted import finals
from several import lines, start
from several_recipes import enough_cards
from test_recipes import RECIPES, short, small

from linearize.config import compose


@pytest.fixture(autouse=True)
def as_many_cards(request: pytest.FixtureRequest) -> None:
    enough_cards(request)


QUICK = sorted(covering.fewest(RECIPES, covering.whole))
"""Recipes that between them have every part and train in every way; the others are slow."""
OTHERS = [name for name in RECIPES if name not in QUICK]
GROUPS = [QUICK[part::4] for part in range(4)] + [
    pytest.param(OTHERS[part::4], marks=pytest.mark.slow) for part in range(4)
]


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_every_recipe(names: list[str], teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    texts = [f"data.source='{tmp_path}/text.txt'", f"data.validation='{tmp_path}/text.txt'"]
    recipes = {}
    for name in names:
        shipped = compose(name)
        recipes[name] = compose(name, short(shipped, 40, 2) + small(shipped) + texts)
    ended = start(2, several_jobs.all_recipes, str(teacher_folder), recipes, tmp_path, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said[-4000:]
    for name, recipe in recipes.items():
        assert (tmp_path / "two" / name / "results.json").is_file(), name
        if not recipe.stages:
            continue
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        found, expected = lines(two), lines(one)
        assert [line["stage"] for line in found] == [line["stage"] for line in expected], name
        for key in ("loss", "grad_norm"):
            values = [[line[key] for line in rows] for rows in (found, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-4), (name, key)
        others = finals(two)
        for stage, tensors in finals(one).items():
            for key, tensor in tensors.items():
                # a gradient that is rounding alone has a sign alone in AdamW's steps, of 1e-2 at most
                slack = {"rtol": 1e-2, "atol": 1e-3}
                torch.testing.assert_close(others[stage][key], tensor, **slack, msg=f"{name} {stage} {key}")
