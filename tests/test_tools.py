"""Tools that hold a model in their own way: offloading to memory and disk, adapters without a list of targets."""

from __future__ import annotations

import accelerate
import peft
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import linearize
from linearize import surgery
from linearize.config import compose
from linearize.eval.perplexity import perplexity

IDS = tiny.tokens()
GREEDY = {"max_new_tokens": 8, "do_sample": False}
PLACES = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
CPU = torch.device("cpu")
WAYS = {
    "device_map": lambda path, folder: load(path, device_map=PLACES, offload_folder=folder),
    "cpu_offload": lambda path, folder: accelerate.cpu_offload(load(path), execution_device=CPU),
    "disk_offload": lambda path, folder: accelerate.disk_offload(load(path), folder, execution_device=CPU),
    "dispatch_model": lambda path, folder: accelerate.dispatch_model(
        load(path), device_map=PLACES, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}
RECIPES = ["lolcats", "lizard", "radlads_rwkv7", "gated_deltanet", "lawcat"]


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def converted(recipe: str, model=None):
    model = surgery.convert(tiny.model() if model is None else model, compose(recipe, []).mixer)
    torch.manual_seed(0)
    for layer in surgery.converted(model):
        for parameter in layer.mixer.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def says(model):
    return model(IDS).logits, model.generate(IDS, **GREEDY)


@pytest.mark.parametrize("recipe", RECIPES)
def test_offloaded_models_say_the_same(recipe, tmp_path):
    model = converted(recipe)
    path = linearize.save(model, tmp_path / "out")
    logits, generated = says(model)
    for name, way in list(WAYS.items())[: 4 if recipe == "lolcats" else 2]:
        offloaded = way(path, tmp_path / name)
        assert any(parameter.is_meta for parameter in offloaded.parameters())
        found = says(offloaded)
        assert torch.equal(found[0], logits) and torch.equal(found[1], generated), name
        assert any(p.is_meta for layer in surgery.converted(offloaded) for p in layer.mixer.parameters())


def test_an_offloaded_model_as_teacher_measured_and_saved(tmp_path):
    model = converted("lolcats")
    path = linearize.save(model, tmp_path / "out")
    offloaded = WAYS["device_map"](path, tmp_path / "offloaded")
    with surgery.mode(model, "teacher"), surgery.mode(offloaded, "teacher"):
        assert torch.equal(says(offloaded)[0], says(model)[0])
    assert perplexity(offloaded, None, IDS) == perplexity(model, None, IDS)
    again = linearize.load(linearize.save(offloaded, tmp_path / "again"))
    assert torch.equal(says(again)[0], says(model)[0])


def test_a_teacher_that_is_offloaded_already_is_converted(tmp_path):
    tiny.model().save_pretrained(tmp_path / "teacher")
    places = {**PLACES, "model.embed_tokens": "cpu"}
    teacher = load(tmp_path / "teacher", device_map=places, offload_folder=tmp_path / "offloaded")
    expected = says(converted("lolcats"))
    found = says(converted("lolcats", teacher))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_hook_is_back_after_an_error_inside(tmp_path):
    path = linearize.save(converted("lolcats"), tmp_path / "out")
    offloaded = WAYS["cpu_offload"](path, tmp_path)
    mixer = surgery.converted(offloaded)[0].mixer
    hooks = [part.__dict__.get("_hf_hook") for part in mixer.modules()]
    with pytest.raises(AttributeError):
        mixer.chunked(IDS, None, None)
    assert hooks == [part.__dict__.get("_hf_hook") for part in mixer.modules()] and any(hooks)
    assert all(parameter.is_meta for parameter in mixer.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_adapters_without_targets_go_where_they_go_in_the_teacher(family):
    def adapted(model, config):
        made = peft.get_peft_model(model, config)
        return sorted(name for name, _ in made.named_parameters() if any(x in name for x in ("lora", "ia3")))

    for config in (peft.LoraConfig, peft.IA3Config, peft.AdaLoraConfig):
        options = {"total_step": 10} if config is peft.AdaLoraConfig else {}
        expected = adapted(tiny.model(family), config(**options))
        model = surgery.convert(tiny.model(family), tiny.LOLCATS)
        assert adapted(model, config(**options)) == expected and expected
