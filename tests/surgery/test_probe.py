"""What the probe must see, family by family: half the difference is in what it refuses, half in what it must not."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import odd
import pytest
import tiny
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import linearize
from linearize import surgery
from linearize.errors import UnsupportedModelError

REFUSED = {
    "doge": r"DogeAttention\): its attention mask has 4 heads",
    "deepseek_v32": r"DeepseekV32Attention\): uses keys chosen by an index.*'indices'",
    "glm_moe_dsa": r"GlmMoeDsaAttention\): uses keys chosen by an index.*'indices'",
    "minimax_m3_vl_text": r"layers\.1\.self_attn .*uses blocks of keys chosen by an index.*'block_indices'",
    "diffllama": r"DiffLlamaAttention\): calls its attention function 2 times a forward",
    "hrm_text": r"HrmTextAttention\): runs 4 times in one forward of the model",
    "zamba2": r"Zamba2Attention\): has the cache index -1",
    "gemma3n_text": r"layers\.2\.self_attn .*uses those of an earlier layer \(shared KV\)",
    "gemma4_text": r"layers\.2\.self_attn .*uses those of an earlier layer \(shared KV\)",
}

EXACT = {
    "opt": ["none"] * 4,
    "llama4_text": ["pairs-complex"] * 3 + ["none"],
    "deepseek_v2": ["pairs-complex-last"] * 4,
    "falcon_h1": ["half"] * 4,
    "zaya": ["other"] * 4,
    "bamba": ["half"] * 2,
    "lfm2": ["half"] * 2,
    "qwen3_next": ["half"] * 2,
    "gptj": ["other"] * 4,
    "jetmoe": ["half"] * 4,
}
"""Family -> how each of its attention layers rotates queries."""


@pytest.mark.parametrize("family", REFUSED)
def test_more_than_q_k_v_and_padding_is_refused_loaded_or_not(family):
    model = odd.model(family)
    before = {name: type(module) for name, module in model.named_modules()}, copy.deepcopy(vars(model.config))
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]) as loaded:
        surgery.convert(model, tiny.LOLCATS)
    with pytest.raises(UnsupportedModelError) as planned:
        surgery.plan(odd.config(family), tiny.LOLCATS)
    assert str(planned.value) == str(loaded.value), "inspect must say what run says"
    after = {name: type(module) for name, module in model.named_modules()}, vars(model.config)
    assert before == after
    model(tiny.tokens())


@pytest.mark.parametrize("family", EXACT)
def test_identity_through_files_padded_and_cached(family, tmp_path):
    model = odd.through_files(family, tmp_path / "teacher")
    odd.skip_before_the_interface(model)
    kinds = [layer.shape.rotary for layer in surgery.attention_layers(model)]
    assert kinds == EXACT[family]
    ids, mask, positions = tiny.left_padded()
    padded = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        padded["position_ids"] = positions
    settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "eos_token_id": None}
    settings |= {"attention_mask": mask[:, :20], "return_dict_in_generate": True}

    def answers(model):
        with torch.no_grad():
            plain, left = model(ids).logits, model(ids, **padded).logits[mask.bool()]
        made = model.generate(ids[:, :20], **settings)
        return plain, left, torch.stack(made.logits), made.sequences

    copied = copy.deepcopy(
        model
    )  # a copy's products may round otherwise than the original's, by where it lies
    expected = answers(copied)
    swapped = surgery.convert(copied, tiny.SOFTMAX)
    assert surgery.converted(swapped)
    for ours, theirs in zip(answers(swapped), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)
    with surgery.mode(swapped, "teacher"):
        for ours, theirs in zip(answers(swapped), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["opt", "deepseek_v2"])
def test_exports_answer_as_the_conversion_does(family, tmp_path):
    model = surgery.convert(odd.through_files(family, tmp_path / "teacher"), tiny.LOLCATS)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    ids = tiny.tokens(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
    linearize.save(model, tmp_path / "export")
    loaded = linearize.load(tmp_path / "export")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-6, rtol=0)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


def test_a_family_that_looks_at_numbers_is_planned_without_weights():
    """Which expert gets how many tokens is a number; a plan has none, and must not need them."""
    config = odd.config("jetmoe")
    skeleton = surgery.skeleton(config)
    found = surgery.attention_layers(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    loaded = surgery.attention_layers(odd.model("jetmoe"))
    # how far a token turns is a number, too, which a plan goes without
    assert [layer.shape for layer in found] == [replace(layer.shape, turns=None) for layer in loaded]


def test_what_is_no_decoder_is_said_in_a_line():
    config = odd.AutoConfig.for_model("t5", d_model=32, d_ff=48, num_layers=2, num_heads=4, vocab_size=97)
    with pytest.raises(UnsupportedModelError, match="'t5' model has no causal language model") as error:
        surgery.plan(config, tiny.LOLCATS)
    assert len(str(error.value)) < 200


def test_a_config_that_builds_no_model_is_said_in_a_line():
    config = tiny.config("llama")
    config.hidden_act = "nope"
    with pytest.raises(UnsupportedModelError, match=r"'llama' model cannot be built from this config \("):
        surgery.plan(config, tiny.LOLCATS)


def test_a_package_that_a_family_needs_is_named(monkeypatch):
    def lacking(*args, **kwargs):
        raise ImportError("\nTimmWrapperModel requires the timm library\nInstall it")

    monkeypatch.setattr(odd.AutoModelForCausalLM, "from_config", lacking)
    with pytest.raises(
        UnsupportedModelError, match="cannot be built here: TimmWrapperModel requires the timm lib"
    ):
        surgery.plan(tiny.config("llama"), tiny.LOLCATS)


def test_the_probe_leaves_nothing_behind():
    model = tiny.model("gemma3").train()
    model.model.layers[1].eval()
    training = [module.training for module in model.modules()]
    interface, masks = AttentionInterface.get_interface, dict(ALL_MASK_ATTENTION_FUNCTIONS)
    name = model.config._attn_implementation
    surgery.attention_layers(model)
    assert [module.training for module in model.modules()] == training
    assert AttentionInterface.get_interface is interface
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == masks
    assert model.config._attn_implementation == name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_conversion_does_not_touch_the_caches_of_other_models():
    """A cache layer that files itself under a layer type must not be replaced for models that nobody converted."""
    teacher = odd.model("minimax_m3_vl_text")
    before = dict(DYNAMIC_LAYER_TYPE_MAPPING)  # which the family has filed its own layers in by now
    layer = DynamicCache(config=teacher.config).layers[1]
    cache = DynamicCache(config=teacher.config)
    surgery.cache.adopt(cache, 1)
    assert type(cache.layers[1]) is not type(layer)
    after = dict(DYNAMIC_LAYER_TYPE_MAPPING)
    assert after == before
    assert type(DynamicCache(config=teacher.config).layers[1]) is type(layer)


def test_nan_weights_are_named():
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.self_attn .*hold NaN"):
        surgery.convert(model, tiny.LOLCATS)
