"""What only the model can tell of a recipe is told before the run folder is written."""

from __future__ import annotations

import logging

import pytest
from byte_llama import TEXT

from linearize import cli, distill, surgery
from linearize.config import compose
from linearize.distill import run
from linearize.distill.trainable import check_ranks
from linearize.errors import RecipeError


@pytest.fixture
def texts(tmp_path):
    """Overrides with a short text in place of the sample."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    source = f"'{tmp_path}/text.txt'"
    return [f"data.source={source}", f"data.validation={source}", "data.length=64", "eval.length=64"]


def test_a_rank_wider_than_the_projections_is_refused_before_anything_is_written(
    teacher_folder, tmp_path, texts
):
    recipe = compose("lolcats", ["stages.recover.lora.rank=60000", "run.device=cpu", *texts])
    with pytest.raises(
        RecipeError, match=r"stages.recover.lora.rank: 60000 is wider than any projection"
    ) as caught:
        run(str(teacher_folder), recipe, tmp_path / "run")
    assert "1 problem\n" in str(caught.value) and not (tmp_path / "run").exists()


def test_the_limit_is_that_of_the_widest_projection(teacher_folder):
    from linearize.models import load_config

    config = load_config(str(teacher_folder))
    plan = surgery.plan(config, {"window": {"name": "full"}})
    for rank, fits in ((config.hidden_size, True), (config.hidden_size + 1, False)):
        recipe = compose("lolcats", [f"stages.recover.lora.rank={rank}"])
        if fits:
            check_ranks(recipe, plan, config.hidden_size)
        else:
            with pytest.raises(RecipeError):
                check_ranks(recipe, plan, config.hidden_size)


def test_stages_for_mixers_that_no_layer_of_the_model_gets_are_refused_beforehand(
    teacher_folder, tmp_path, capsys, texts
):
    """Two layers, both of which get the window: nothing of the recipe's own mixer is left."""
    given = ["layers.use.near.first=2", "mixers.near.feature_map=none", "stages.recover.window_dropout=0.5"]
    given += ["mixer.window.overlap=true", "run.device=cpu", *texts]
    with pytest.raises(RecipeError) as caught:
        run(str(teacher_folder), compose("lolcats", given), tmp_path / "run")
    said = str(caught.value)
    assert "stages.transfer.train: the model's layers get near, without parameters" in said
    assert "stages.recover.window_dropout: the model's layers get near, without both branches" in said
    assert "2 problems" in said and not (tmp_path / "run").exists()
    assert cli.main(["inspect", str(teacher_folder), "lolcats", *given]) == 2
    assert "stages.transfer.train: the model's layers get near" in capsys.readouterr().err
    given[0] = "layers.use.near.first=1"
    assert cli.main(["inspect", str(teacher_folder), "lolcats", *given]) == 0


def test_an_every_that_keeps_nothing_is_said_once_in_a_run(teacher_folder, make_recipe, tmp_path, caplog):
    recipe = make_recipe()
    recipe.layers, recipe.stages, recipe.eval.ablations = {"every": 100}, {}, False
    with caplog.at_level(logging.WARNING, "linearize"):
        distill.run(str(teacher_folder), recipe, tmp_path / "run")
    said = "layers.every: 100, but the model has 2 attention layers, so none stays softmax"
    assert caplog.text.count(said) == 1
