"""An adapter goes onto the model that it was made for, and onto no other."""

from __future__ import annotations

import json

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import linearize
from linearize import surgery
from linearize.cli import checkpoint
from linearize.errors import CheckpointError
from linearize.export import load_adapter


def converted(**changes):
    return surgery.convert(tiny.model(**changes), tiny.LOLCATS)


@torch.no_grad()
def logits(model):
    return model(tiny.tokens()).logits


def write_adapter(folder, **changes):
    """A random adapter of a converted model; the model with it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(converted(**changes), config).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def test_it_is_the_model_that_was_trained(tmp_path):
    model = write_adapter(tmp_path)
    assert torch.equal(logits(load_adapter(converted(), tmp_path)), logits(model))
    assert not torch.equal(logits(converted()), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, r"holds nothing for .*layers\.2\..*, which this model asks for"),
        ({"num_hidden_layers": 6}, r"holds .*layers\.4\..*, which this model has no place for"),
        ({"num_key_value_heads": 4}, r"v_proj.* is \[32, 8\], and \[16, 8\] is asked for"),
        ({"hidden_size": 48}, r"is \[8, 48\], and \[8, 32\] is asked for"),
    ],
)
def test_one_of_another_model_is_refused_by_name(changes, message, tmp_path):
    write_adapter(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(converted(), tmp_path)


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGES = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "pickled weights"),
    "cut weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
        "is damaged",
    ),
    "config of no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "edited"),
    "unknown kind": (lambda folder: edited(folder, peft_type="MAGIC"), "edited"),
    "no kind": (lambda folder: edited(folder, peft_type=None), "edited"),
    "a rank that is none": (lambda folder: edited(folder, r=-1), "edited"),
    "a rank beyond all memory": (lambda folder: edited(folder, r=10**12), "another model"),
    "other targets": (lambda folder: edited(folder, target_modules=["c_attn"]), "another model"),
    "one tensor less": (
        lambda folder: save_file(
            dict(list(load_file(folder / "adapter_model.safetensors").items())[1:]),
            folder / "adapter_model.safetensors",
        ),
        "holds nothing for",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ones_are_refused(damage, tmp_path):
    write_adapter(tmp_path)
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(converted(), tmp_path)


def test_commands_take_the_adapter_of_a_checkpoint_along(tmp_path):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    linearize.save(converted(), tmp_path / "out", tokenizer=tokenizer)
    model = write_adapter(tmp_path / "out" / "adapter")
    found, _ = checkpoint.load(str(tmp_path / "out"), "cpu")
    assert (logits(found) - logits(model)).abs().max() < 1e-4
    write_adapter(tmp_path / "out" / "adapter", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="made for another model"):
        checkpoint.load(str(tmp_path / "out"), "cpu")
