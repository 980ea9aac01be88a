"""Saved and loaded again, a converted model is bit-equal, of its family's class, and refuses what is broken."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import linearize
from linearize import surgery
from linearize.errors import CheckpointError

IDS = tiny.tokens()


def trained(family: str = "llama", layers="all"):
    model = surgery.convert(tiny.model(family), tiny.LOLCATS, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", tiny.most_kinds())
def test_round_trip_is_bit_equal(family, tmp_path):
    model = trained(family, [0, 2, 3])
    linearize.save(model, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    expected = logits(model)
    for loaded in (linearize.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert torch.equal(logits(loaded), expected)
        assert isinstance(loaded, type(tiny.model(family)))
        assert loaded.config.model_type == f"linearized_{tiny.config(family).model_type}"
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **settings), model.generate(IDS, **settings))


def test_headless_model_and_config(tmp_path):
    model = trained()
    linearize.save(model, tmp_path / "out")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tmp_path / "out")(IDS).last_hidden_state
        assert torch.equal(hidden, model.model(IDS).last_hidden_state)
    assert AutoConfig.from_pretrained(tmp_path / "out").linearize["mixers"]["default"]["window"]["size"] == 6


def test_teacher_weights_load_into_the_converted_class(tmp_path):
    teacher = tiny.model()
    teacher.save_pretrained(tmp_path / "teacher")
    model = trained()
    loaded, report = type(model).from_pretrained(
        tmp_path / "teacher", config=model.config, output_loading_info=True
    )
    assert report["missing_keys"] and all(".mixer." in key for key in report["missing_keys"])
    fresh = surgery.convert(tiny.model(), tiny.LOLCATS)
    assert torch.equal(logits(loaded), logits(fresh)), "mixers must come out initialized, not as raw memory"


def test_bfloat16_keeps_mixers_in_float32(tmp_path):
    linearize.save(trained(), tmp_path / "out")
    loaded = linearize.load(tmp_path / "out", dtype=torch.bfloat16)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for layer in surgery.converted(loaded) for p in layer.mixer.parameters()} == {
        torch.float32
    }
    assert logits(loaded).isfinite().all()


def test_card_and_provenance(tmp_path):
    recipe = {
        "description": "hybrid",
        "paper": "someone",
        "data": {"source": "builtin", "length": 8},
        "stages": {
            "transfer": {
                "objective": {"attention_output": 1000.0},
                "tokens": 1000,
                "lr": 0.01,
                "train": ["mixers"],
            }
        },
    }
    rows = [{"name": "teacher", "perplexity": {"held-out": 12.345}}]
    out = linearize.save(trained(), tmp_path / "out", base="tiny", recipe=recipe, metrics={"rows": rows})
    card = (out / "README.md").read_text()
    for text in (
        "tiny, linearized",
        "hybrid (someone)",
        "| window | sliding (size 6,",
        "1000.0 x attention_output",
        "12.35",
    ):
        assert text in card
    assert json.loads((out / "linearize.json").read_text())["metrics"]["rows"] == rows


def test_saving_over_a_checkpoint_replaces_it_whole(tmp_path):
    linearize.save(trained(), tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("old")
    linearize.save(trained(layers=[1]), tmp_path / "out")
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_checkpoint_is_not_replaced(tmp_path):
    model = trained()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, said in (("file", "is a file"), ("folder", "holds other things than a checkpoint")):
        with pytest.raises(CheckpointError, match=f"{said}.*would be lost"):
            linearize.save(model, tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "letter.txt").read_text() == "mine"
    linearize.save(model, tmp_path / "empty")
    (tmp_path / "link").symlink_to("empty")
    linearize.save(trained(layers=[1]), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(
        surgery.converted(linearize.load(tmp_path / "empty"))
    ) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder", "link"]


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model = trained()
    linearize.save(model, tmp_path / "out")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(
        CheckpointError, match=r"What was there before is untouched: .*, then give the command again$"
    ):
        linearize.save(model, tmp_path / "out")
    assert torch.equal(logits(linearize.load(tmp_path / "out")), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def corrupt_truncate(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt_header(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def corrupt_config(folder):
    (folder / "config.json").write_text("{")


def corrupt_format(folder):
    config = json.loads((folder / "config.json").read_text())
    config["linearize"]["format"] = 99
    (folder / "config.json").write_text(json.dumps(config))


def corrupt_mixer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["linearize"]["mixers"]["default"]["feature_map"]["name"] = "hedgehogg"
    (folder / "config.json").write_text(json.dumps(config))


def corrupt_weights_gone(folder):
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_truncate, "corrupt or truncated"),
        (corrupt_header, "corrupt or truncated"),
        (corrupt_config, "not JSON"),
        (corrupt_format, "format 99 is neither 1 nor 2"),
        (corrupt_mixer, "did you mean 'hedgehog'"),
        (corrupt_weights_gone, "pickled weights"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_checkpoints_are_refused(damage, message, tmp_path):
    linearize.save(trained(), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        linearize.load(tmp_path / "out")


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        linearize.load(tmp_path)
