"""An export is held against its model; what does not give it back is named, and never stands in its place."""

from __future__ import annotations

import importlib
import json
import logging

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import linearize
from linearize import surgery
from linearize.errors import CheckpointError
from linearize.export import verify
from linearize.export.verify import (
    in_new_process as REAL_PROCESS,
)  # the tests' conftest puts another in its place
from linearize.kernels import dispatch

SAVING = importlib.import_module("linearize.export.save")
CHANGED = "model.layers.1.self_attn.q_proj.weight"


def trained(family: str = "llama"):
    model = surgery.convert(tiny.model(family), tiny.LOLCATS, [0, 2, 3])
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


def spoilt(monkeypatch, damage) -> None:
    """Damage every folder between its writing and its check."""

    def write_and_spoil(*args, **kwargs):
        damage(args[1])
        return check(*args, **kwargs)

    check = SAVING.verify
    monkeypatch.setattr(SAVING, "verify", write_and_spoil)


def edit_tensors(folder, edit) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGES = {
    "another value": (
        lambda folder: edit_tensors(folder, lambda held: held[CHANGED][0, 0].add_(1.0)),
        f"tensor {CHANGED} is not the model's",
    ),
    "a tensor gone": (
        lambda folder: edit_tensors(folder, lambda held: held.pop(CHANGED)),
        f"missing .{CHANGED}",
    ),
    "one too many": (
        lambda folder: edit_tensors(folder, lambda held: held.update(more=torch.zeros(1))),
        "unexpected .more",
    ),
    "another config": (
        lambda folder: edit_config(folder, rms_norm_eps=0.5),
        r"logits differ from the model's by .* at token \d+",
    ),
    "another rotation": (
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 7.0}),
        r"turns\[0\] .* and the model's rotary embedding turns it by",
    ),
    "numbers that are none": (lambda folder: edit_config(folder, rms_norm_eps=float("nan")), "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_differs_is_named_and_nothing_is_lost(damage, tmp_path, monkeypatch):
    linearize.save(trained(), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    change, message = DAMAGES[damage]
    spoilt(monkeypatch, change)
    with pytest.raises(CheckpointError, match=message) as error:
        linearize.save(trained(), tmp_path / "out", check=True)
    assert "out-failed" in str(error.value)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "out-failed" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-failed"]


def test_a_wrong_cache_shows_though_the_logits_are_right(tmp_path, monkeypatch):
    model = trained()
    linearize.save(model, tmp_path / "out", check=True)
    attend = surgery.cache.LinearizedCacheLayer.attend
    expected = verify._expected(model, verify._text(model))
    monkeypatch.setattr(verify, "_expected", lambda *args: expected)

    def forgets(self, *args, **kwargs):
        self.state = None
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(surgery.cache.LinearizedCacheLayer, "attend", forgets)
    with pytest.raises(CheckpointError, match="greedy decoding gives token"):
        linearize.save(model, tmp_path / "out", check=True)


@pytest.mark.parametrize("family", tiny.most_kinds())
def test_every_family_passes(family, tmp_path):
    model = trained(family).train()
    linearize.save(model, tmp_path / "out", check=True)
    assert model.training and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_pass(dtype, tmp_path):
    linearize.save(trained(), tmp_path / "wide")
    model = linearize.load(tmp_path / "wide", dtype=dtype)
    linearize.save(model, tmp_path / "out", check=True)
    spread = linearize.load(tmp_path / "out").state_dict()
    assert {tensor.dtype for tensor in spread.values()} == {dtype, torch.float32}


def test_a_model_that_gives_no_numbers_is_said_to(tmp_path):
    model = trained()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="the model itself gives logits that are not finite"):
        linearize.save(model, tmp_path / "out", check=True)


def test_a_model_that_cannot_generate_is_said_to_and_kept(tmp_path, monkeypatch):
    model = trained()

    def breaks(*args, **kwargs):
        raise TypeError("no cache layer of this kind")

    monkeypatch.setattr(model, "_prepare_cache_for_generation", breaks)
    with pytest.raises(
        CheckpointError, match=r"cannot generate text with a cache .TypeError: no cache layer"
    ):
        linearize.save(model, tmp_path / "out", check=True)
    assert (tmp_path / "out-failed" / "model.safetensors").is_file()


def test_too_little_memory_is_said_and_loses_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(verify, "machine", lambda: (1000, 2000))
    with caplog.at_level(logging.WARNING, "linearize"):
        linearize.save(trained(), tmp_path / "out", check=True)
    assert "was not checked" in caplog.text and (tmp_path / "out" / "config.json").is_file()


def test_what_the_teachers_makers_would_sample_with_does_not_stand_in_the_way(tmp_path):
    """Stop strings need a tokenizer, and a finished training must not end for lack of one."""
    model = trained()
    model.generation_config.stop_strings = ["a"]
    model.generation_config.return_dict_in_generate = True
    model.generation_config.repetition_penalty = 1.3
    kept = model.generation_config
    folder = linearize.save(model, tmp_path / "out", check=True)
    assert model.generation_config is kept
    assert json.loads((folder / "generation_config.json").read_text())["stop_strings"] == ["a"]


def test_kernels_are_left_out_on_both_sides(monkeypatch, tmp_path):
    """The file is held against the model, not one form of an operator against another."""
    forms, told = [], []
    checking = importlib.import_module("linearize.export.verify")
    answers = checking.reloading.answers

    def asked(model, ids):
        forms.append(dispatch.use_triton(torch.zeros(1)))
        return answers(model, ids)

    def run(command, **options):
        told.append(options["env"]["LINEARIZE_KERNELS"])
        raise OSError("no process")

    monkeypatch.setattr(checking.reloading, "answers", asked)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = trained()
    with dispatch.kernels("triton"):
        checking._expected(model, checking._text(model))
    monkeypatch.setattr(checking.subprocess, "run", run)
    with pytest.raises(CheckpointError, match="cannot be started"):
        REAL_PROCESS({"result": str(tmp_path / "result.json")}, tmp_path)
    assert forms == [False] and told == ["torch"]
