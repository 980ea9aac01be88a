"""Models, configs and caches go to another process, which has never made their classes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache

from linearize import surgery

SCRIPT = """
import sys, torch
for made in torch.load(sys.argv[1], weights_only=False):
    model, ids = made["model"], made["ids"]
    assert type(model) is type(made["twin"]) and type(model).__name__ == made["name"]
    assert all(layer.linearize_switch is made["switch"] for layer in made["layers"])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, made["logits"]), "logits"
        assert torch.equal(made["twin"](ids).logits, made["logits"]), "twin"
        step = model(made["next"], past_key_values=made["cache"]).logits
        assert torch.equal(step, made["step"]), "step"
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, made["generated"]), "generated"
print("compared")
"""


def spawned(rank, model, ids, logits):
    assert torch.equal(model(ids).logits, logits)


@pytest.fixture
def model():
    made = surgery.convert(tiny.model(), tiny.LAWCAT)
    tiny.randomize(layer.mixer for layer in surgery.converted(made))
    return made.requires_grad_(False)


def held(family: str) -> dict:
    """A converted model, what hangs on it, and what it says."""
    model, ids = surgery.convert(tiny.model(family), tiny.LOLCATS, [0, 2]), tiny.tokens()
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    model.requires_grad_(False)
    layers, cache = surgery.converted(model), DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return {
        "name": type(model).__name__,
        "model": model,
        "twin": copy.deepcopy(model),
        "switch": layers[0].linearize_switch,
        "layers": layers,
        "cache": cache,
        "ids": ids,
        "next": ids[:, :1],
        "logits": model(ids).logits,
        "step": model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits,
        "generated": model.generate(ids, max_new_tokens=4, do_sample=False),
    }


def test_saved_whole_and_loaded_in_a_new_process(tmp_path):
    torch.save([held(family) for family in ("llama", "gpt_neox", "gemma3")], tmp_path / "models.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "models.pt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "compared\n"


def test_spawned_processes_get_the_model(model):
    ids = tiny.tokens()
    torch.multiprocessing.spawn(spawned, args=(model.share_memory(), ids, model(ids).logits), nprocs=1)


def test_copies_are_of_the_same_classes(model):
    for made in (copy.deepcopy(model), copy.copy(model)):
        assert type(made) is type(model) and type(made.config) is type(model.config)
        assert torch.equal(made(tiny.tokens()).logits, model(tiny.tokens()).logits)
    assert copy.deepcopy(model).config.to_dict() == model.config.to_dict()


def test_static_caches_too(model):
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(tiny.tokens(), past_key_values=cache)
    again = copy.deepcopy(cache)
    assert type(again.layers[0]) is type(cache.layers[0])
    step = [model(tiny.tokens()[:, :1], past_key_values=held).logits for held in (cache, again)]
    assert torch.equal(*step)


def test_somebodys_own_subclass_is_pickled_as_theirs(model):
    class Theirs(type(model)):
        pass

    model.__class__ = Theirs
    assert type(copy.deepcopy(model)) is Theirs
