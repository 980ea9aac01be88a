"""Runs whose text the teacher writes, alone and in a mix."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from byte_llama import byte_tokenizer
from interrupted import at_step, press_ctrl_c
from safetensors.torch import load_file
from transformers import GPTJConfig, GPTJForCausalLM

from linearize import distill, models
from linearize.config.schema import CalibrateConfig, StageDataConfig, TeacherConfig
from linearize.distill import RunStopped, texts
from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.sample import store
from linearize.sample.writer import Writer

WRITING = TeacherConfig(length=96, batch=4, temperature=1.0, top_k=50)


@pytest.fixture(autouse=True)
def sampled_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def recipe(make_recipe):
    """Three quarters of the text are the teacher's; one stage reads nothing else."""
    made = make_recipe(tokens=6 * 2 * 64)
    mix = {"teacher": 3, made.data.source: 1}
    made.stages["recover"].data = StageDataConfig(source="teacher")
    data = replace(made.data, source="builtin", mix=mix, teacher=replace(WRITING))
    return replace(
        made, data=data, calibrate=CalibrateConfig(tokens=128), eval=replace(made.eval, ablations=False)
    )


def weights(folder):
    return load_file(folder / "checkpoint" / "model.safetensors")


def test_a_run_on_its_teachers_text(teacher_folder, recipe, tmp_path, caplog):
    with caplog.at_level("INFO", logger="linearize"):
        distill.run(str(teacher_folder), recipe, tmp_path / "run")
    assert "text from the teacher:" in caplog.text and "written in" in caplog.text
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in losses if "stage" in row} >= {"transfer", "recover"}
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "teacher: 3" in written and str(store.cache_dir()) not in written, "the recipe stays what it was"
    caplog.clear()
    with caplog.at_level("INFO", logger="linearize"):
        distill.run(str(teacher_folder), recipe, tmp_path / "again")
    assert "all from the cache" in caplog.text
    one, other = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_resumed_it_reads_the_same(teacher_folder, recipe, tmp_path, monkeypatch):
    """Also where more of the teacher's text has come into the cache meanwhile."""
    distill.run(str(teacher_folder), recipe, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        at_step(patch, "recover", 4, press_ctrl_c)
        distill.run(str(teacher_folder), recipe, tmp_path / "cut")
    tokenizer = models.load_tokenizer(teacher_folder)
    where = {"device": torch.device("cpu"), "weights": torch.float32}
    texts.write(recipe, str(teacher_folder), tokenizer, tokens=5000, **where)
    distill.run(str(teacher_folder), recipe, tmp_path / "cut", resume=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_wrong_is_said_before_any_weight_is_loaded(teacher_folder, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_teacher", lambda *x, **y: pytest.fail("loaded"))
    recipe.data.mix["bokos.txt"] = 1
    recipe.data.teacher.chat = 0.5
    recipe.stages["recover"].data = StageDataConfig(source=str(tmp_path / "none.txt"))
    with pytest.raises(LinearizeError) as caught:
        distill.run(str(teacher_folder), recipe, tmp_path / "run")
    said = str(caught.value)
    assert "3 problems" in said and "bokos.txt" in said and "none.txt" in said and "no chat template" in said
    assert not (tmp_path / "run").exists() and not store.cache_dir().exists()


def test_what_loaded_weights_show_is_said_before_any_text_is_written(recipe, tmp_path, monkeypatch):
    """That a family's rotation cannot be taken back is not seen in its config."""
    monkeypatch.setattr(Writer, "write", lambda *x, **y: pytest.fail("written"))
    config = GPTJConfig(vocab_size=259, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=512)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "odd")
    byte_tokenizer().save_pretrained(tmp_path / "odd")
    recipe.mixer["window"]["overlap"] = True
    recipe.mixer["position"] = {"name": "rope", "recurrent": False}
    with pytest.raises(UnsupportedModelError, match="cannot be rotated back"):
        distill.run(str(tmp_path / "odd"), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recipe.data.mix = {}
    recipe.stages["recover"].data = None
    with pytest.raises(UnsupportedModelError, match="cannot be rotated back"):
        distill.run(str(tmp_path / "odd"), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nor before the teacher is evaluated"


def test_how_much_is_wanted(recipe):
    transfer, recover = recipe.stages.values()
    assert texts.most(recipe) == round(1.02 * recover.tokens)
    transfer.tokens *= 4
    assert texts.most(recipe) == round(1.02 * 0.75 * transfer.tokens)
    plain = replace(recipe, data=replace(recipe.data, mix={}))
    recover.data = None
    assert texts.most(plain) == 0
