"""Layers with mixers of their own: all forms of the model agree, cached states of different shapes side by side."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from mixed import LAYERS, MIXER, MIXERS, mixed
from rich.console import Console

import linearize
from linearize import export, surgery
from linearize.cli.inspection import table, totals
from linearize.decode import Decoder
from linearize.errors import CheckpointError, LinearizeError, RecipeError, UnsupportedModelError
from linearize.eval.cast import layout, swapped

GIVEN = ["default", "window", "nope", "both", "default"]
families = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "gpt2"])


def close(out, expected):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(out, expected, atol=1e-5 * scale, rtol=0)


@pytest.fixture(scope="module")
def model():
    return mixed()


@families
def test_forms_agree(family):
    """Whole, alone, in a prompt and pieces and single tokens with a cache, left padding, packed documents."""
    changes = {"n_layer": 6} if family == "gpt2" else {"num_hidden_layers": 6}
    model = surgery.convert(tiny.model(family, **changes), MIXER, LAYERS, MIXERS)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    assert [layer.layer_idx for layer in surgery.converted(model)] == [0, 1, 3, 4, 5]
    ids, mask, positions = tiny.left_padded()
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=positions).logits
        close(full[:1, 7:], model(ids[:1, 7:]).logits)
        cache, cached = None, []
        for first, last in ((0, 21), (21, 22), (22, 30), *((t, t + 1) for t in range(30, 40))):
            step = model(
                ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = step.past_key_values
            cached.append(step.logits)
        close(torch.cat(cached, 1)[mask.bool()], full[mask.bool()])
        packed = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
        documents = model(ids, position_ids=packed, use_cache=False).logits
        close(documents[:, 15:], model(ids[:, 15:]).logits)


def test_generation_of_every_kind(model):
    ids, mask, _ = tiny.left_padded(length=20)
    settings = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **settings)
    for more in ({}, {"prefill_chunk_size": 6}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(ids, **settings, **more), expected)
    beams = {**settings, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    assisted = model.generate(ids[1:], max_new_tokens=14, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted, model.generate(ids[1:], max_new_tokens=14, do_sample=False))
    decoder = Decoder(model, 2, eos=[2], pad=0, length=64)
    assert torch.equal(decoder.generate(ids, mask, 14), expected[:, 20 : 20 + 14])


def test_teacher_mode_and_branches(model):
    ids = tiny.tokens()
    plain = tiny.model(num_hidden_layers=6)
    with torch.no_grad():
        expected = model(ids).logits
        with surgery.mode(model, "teacher"):
            assert torch.equal(model(ids).logits, plain(ids).logits)
        both = surgery.converted(model)[3].mixer
        for branch in ("window", "linear"):
            with surgery.branch_off(model, branch):
                off = [layer.mixer.branch_off for layer in surgery.converted(model)]
                assert off == [None, None, None, branch, None], "only the layer that has both can lose one"
                assert not torch.allclose(model(ids).logits, expected)
        assert both.branch_off is None and torch.equal(model(ids).logits, expected)


def test_checkpointing_gives_the_same_gradients():
    ids, found = tiny.tokens(), []
    for checkpointing in (False, True):
        model = mixed().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == len(list(model.parameters()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_saved_and_loaded_in_a_fresh_process_with_and_without_the_package(family, tmp_path):
    model = mixed(family)
    recipe = {"mixer": MIXER, "mixers": MIXERS, "layers": LAYERS}
    folder = linearize.save(model, tmp_path / "out", check=True, recipe=recipe)
    loaded = linearize.load(folder)
    with torch.no_grad():
        assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)
    again = linearize.save(loaded, tmp_path / "again", check=True, recipe=recipe)
    config, second = (json.loads((path / "config.json").read_text()) for path in (folder, again))
    assert config["linearize"] == second["linearize"] and config["linearize"]["format"] == 2
    assert [numbers["mixer"] for numbers in config["linearize"]["layers"].values()] == GIVEN
    card = (folder / "README.md").read_text()
    assert (
        "## Layers 1: window" in card
        and "## Layers 0, 5: default" in card
        and "but for 1 that see every token" in card
    )
    config["linearize"]["mixers"]["window"]["window"]["first"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"says mixers\.window\.window\.first: 3, and .* trained with 2"
    ):
        export.load(folder)


def test_a_layer_that_is_given_another_layers_mixer_is_refused(model, tmp_path):
    folder = linearize.save(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["linearize"]["layers"]["model.layers.0.self_attn"]["mixer"] = "both"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.mixer"):
        export.load(folder)


def test_the_untrained_swap_of_a_checkpoint_has_its_layout(model):
    plain = tiny.model(num_hidden_layers=6)
    with swapped(plain, *layout(plain, model.config.linearize)) as fresh:
        assert fresh.config.linearize == model.config.linearize
    named = surgery.convert(
        tiny.model(), tiny.LOLCATS, "WN", {name: MIXERS[name] for name in ("window", "nope")}
    )
    assert set(named.config.linearize["mixers"]) == {"window", "nope"}
    with swapped(tiny.model(), *layout(tiny.model(), named.config.linearize)) as fresh:
        assert fresh.config.linearize == named.config.linearize
    with pytest.raises(LinearizeError, match="has 4 of the 5 attention layers"):
        layout(tiny.model(num_hidden_layers=5), model.config.linearize)


def test_a_plan_says_which_layers_become_what():
    plan = surgery.plan(tiny.config("llama", num_hidden_layers=6), MIXER, LAYERS, mixers=MIXERS)
    model = mixed()
    assert plan.parameters == sum(layer.mixer.added_parameters for layer in surgery.converted(model))
    assert [row.mixer for row in plan.rows] == ["default", "window", None, "nope", "both", "default"]
    assert [row.grows for row in plan.rows] == [False, False, False, True, False, False]
    assert plan.kv_bytes_per_token == 4 * plan.rows[0].kv_bytes_per_token, "the growing one saves nothing"
    written = plan.to_dict()
    assert written["mixers"]["nope"] == "full softmax, no RoPE" and written["layers"][3]["mixer"] == "nope"
    screen = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(table(plan))
    text = " ".join(screen.export_text().split())
    assert "0, 5" in text and "window: " in text and "(stay" in text
    assert any("the layers that see every token keep 128 B" in line for line in totals(plan, 1000))


def test_wrong_mixers_are_refused_before_anything_is_touched():
    model = tiny.model()
    with pytest.raises(RecipeError, match=r"mixers\.a\.window\.name: .*did you mean \'sliding\'"):
        surgery.convert(model, MIXER, {"use": {"a": [0]}}, {"a": {"window": {"name": "slidin"}}})
    with pytest.raises(RecipeError, match=r"names layer 1, as layers\.keep does"):
        surgery.convert(model, MIXER, {"keep": [1], "use": {"window": [1]}}, {"window": MIXERS["window"]})
    assert not surgery.converted(model)
    gptj = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    from transformers import GPTJConfig, GPTJForCausalLM

    odd = GPTJForCausalLM(GPTJConfig(**gptj)).eval()
    with pytest.raises(UnsupportedModelError, match="cannot be rotated back"):
        surgery.convert(odd, tiny.LOLCATS, {"use": {"nope": [1]}}, {"nope": MIXERS["nope"]})
    surgery.convert(odd, MIXER, {"keep": [0], "use": {"window": [1]}}, {"window": MIXERS["window"]})
