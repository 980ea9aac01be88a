"""The comparison with the untouched model finds what the probe does not know, and undoes the surgery."""

from __future__ import annotations

import copy

import odd
import pytest
import tiny
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize import surgery
from linearize.errors import UnsupportedModelError
from linearize.surgery import arguments, inspection
from linearize.surgery.verify import answers, softmax_view


@pytest.fixture
def blind(monkeypatch):
    """A probe that refuses nothing: what is left must be found in the numbers."""
    monkeypatch.setattr(inspection, "_refusal", lambda *args: None)
    monkeypatch.setattr(inspection, "_check_cache", lambda *args: None)
    monkeypatch.setattr(inspection.Probe, "local_size", lambda *args: None)
    monkeypatch.setattr(arguments, "refusal", lambda *args, **kwargs: None)


FOUND = {
    "doge": "an attention mask that differs from head to head",
    "diffllama": "as a softmax .* on a prompt with a cache",
    "deepseek_v32": "in teacher mode, on the whole sequence",
    "minimax_m3_vl_text": r"layers\.1\.self_attn .*in teacher mode, on the whole sequence",
    "hrm_text": "differs from the untouched model",
    "zamba2": "as a softmax .* with a cache",
    "llama4_text": "as a softmax .* on one token with a cache",
}


@pytest.mark.parametrize("family", FOUND)
def test_differences_are_found_in_the_numbers(family, blind):
    model = odd.model(family)
    before = {name: type(module) for name, module in model.named_modules()}
    numbers = copy.deepcopy(vars(model.config))
    with torch.no_grad():
        expected = model(tiny.tokens()).logits
    with pytest.raises(UnsupportedModelError, match=FOUND[family]) as error:
        surgery.convert(model, tiny.LOLCATS)
    assert family == "doge" or "differs from the untouched model by" in str(error.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert vars(model.config) == numbers
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(tiny.tokens()).logits, expected)


def test_a_difference_in_one_layer_names_that_layer(monkeypatch):
    """A wrong number in the third layer alone is found there, not in the layers after it."""
    real = inspection._shape

    def wrong(*given, **how):
        shape = real(*given, **how)
        wrong.calls += 1
        return (
            shape if wrong.calls != 3 else copy.copy(shape.__class__(**{**shape.to_dict(), "softcap": 0.5}))
        )

    wrong.calls = 0
    monkeypatch.setattr(inspection, "_shape", wrong)
    monkeypatch.setattr(arguments, "changed", lambda *args: None)
    model = tiny.model()
    model.config._attn_implementation = "eager"
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.2\.self_attn \(LlamaAttention\)"):
        surgery.convert(model, tiny.LOLCATS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_rounding_is_no_difference(family, dtype):
    model = tiny.model(family).to(dtype)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    assert surgery.converted(surgery.convert(model, tiny.LOLCATS))


def test_a_model_that_overflows_is_named():
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(
        UnsupportedModelError, match="no finite number on the whole sequence, before any surgery"
    ):
        surgery.convert(model, tiny.LOLCATS)


def test_the_tolerance_of_bfloat16_hides_no_difference(blind):
    with pytest.raises(UnsupportedModelError, match="differs from the untouched model"):
        surgery.convert(odd.model("diffllama").to(torch.bfloat16), tiny.LOLCATS)


def test_no_random_number_is_drawn_and_modes_stay():
    model = tiny.model().train()
    model.model.layers[1].eval()
    training = {name: module.training for name, module in model.named_modules()}
    layers = surgery.attention_layers(model)
    state = torch.get_rng_state()
    list(answers(model.eval(), layers))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    model.model.layers[1].eval()
    swapped = surgery.convert(model, tiny.SOFTMAX)
    assert {n: m.training for n, m in swapped.named_modules() if ".mixer" not in n} == training


def test_the_calls_are_whole_and_cached():
    model = tiny.model()
    seen = list(answers(model, surgery.attention_layers(model)))
    assert [answer.form for answer in seen] == [
        "the whole sequence",
        "a prompt with a cache",
        "one token with a cache",
        "one token with a cache",
    ]
    assert all(len(answer.layers) == 4 for answer in seen)
    assert not seen[0].valid.all(), "left padding must be exercised"


def test_the_view_gives_the_mixers_back():
    model = surgery.convert(tiny.model(), tiny.LOLCATS)
    mixers = [layer.mixer for layer in surgery.converted(model)]
    with softmax_view(model):
        assert all(
            layer.mixer is not mixer for layer, mixer in zip(surgery.converted(model), mixers, strict=True)
        )
    assert [layer.mixer for layer in surgery.converted(model)] == mixers


def test_a_family_with_attention_functions_of_its_own_keeps_them_as_the_teacher(monkeypatch):
    """A modeling file may override `sdpa` for itself; the teacher must be that one."""
    import transformers.models.llama.modeling_llama as family
    from transformers import AttentionInterface

    def halved(module, query, key, value, attention_mask, **kwargs):
        output, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
        return output / 2, weights

    own = AttentionInterface()
    own["sdpa"] = halved
    monkeypatch.setattr(family, "ALL_ATTENTION_FUNCTIONS", own)
    with pytest.raises(UnsupportedModelError, match="as a softmax over its queries"):
        surgery.convert(tiny.model(), tiny.LOLCATS)


def test_a_model_that_fails_on_padded_rows_is_named(monkeypatch):
    model = tiny.model()
    forward = type(model.model).forward

    def fussy(self, *args, **kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[0] > 1:
            raise ValueError("one row at a time")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", fussy)
    with pytest.raises(UnsupportedModelError, match="its forward fails before surgery on left-padded rows"):
        surgery.convert(model, tiny.LOLCATS)
