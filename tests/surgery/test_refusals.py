"""What cannot be converted is refused by name and reason, and nothing is left half done."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

from linearize import surgery
from linearize.errors import LinearizeError, RecipeError, UnsupportedModelError
from linearize.surgery import inspection

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "BloomAttention"),
        ("FalconConfig", SIZES, "FalconAttention"),
        (
            "MambaConfig",
            {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
            "no softmax attention",
        ),
        ("BertConfig", {**SIZES, "intermediate_size": 32}, "not causal"),
    ],
)
def test_unsupported_attention_names_module_and_reason(name, values, message):
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**values))
    with pytest.raises(UnsupportedModelError, match=message):
        surgery.convert(model, tiny.LOLCATS)
    assert not surgery.converted(model)


def test_a_decoder_whose_config_is_not_causal_is_refused_without_weights_too():
    model = tiny.model("llama")
    model.config.is_causal = False
    for either in (model, inspection.skeleton(model.config)):
        with pytest.raises(UnsupportedModelError, match=r"self_attn .*: not causal \(is_causal=False\)"):
            inspection.attention_layers(either)


def test_wrong_mixer_reports_everything():
    with pytest.raises(RecipeError, match="2 problems"):
        surgery.convert(tiny.model(), {"windw": {"name": "full"}, "feature_map": {"name": "hedghog"}})


def test_converting_twice_is_refused():
    model = surgery.convert(tiny.model(), tiny.LOLCATS)
    with pytest.raises(LinearizeError, match="converted already"):
        surgery.convert(model, tiny.LOLCATS)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", [0, 1, 2, 3]), ({"every": 2}, [0, 2]), ([3, 1], [1, 3]), ({"keep": [0]}, [1, 2, 3])],
)
def test_layer_selection(layers, chosen):
    assert surgery.select(layers, [0, 1, 2, 3]) == chosen


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([9], "no attention layer 9"),
        ("most", "must be all"),
        ([], "converts nothing"),
        ({"every": 1}, "must be at least 2"),
    ],
)
def test_wrong_layer_selection(layers, message):
    with pytest.raises(RecipeError, match=message):
        surgery.select(layers, [0, 1, 2, 3])


def test_modes_and_branches_have_names():
    model = surgery.convert(tiny.model(), tiny.HEDGEHOG)
    with pytest.raises(LinearizeError, match="did you mean 'teacher'"), surgery.mode(model, "teachr"):
        pass
    with pytest.raises(LinearizeError, match="no layer has both"), surgery.branch_off(model, "linear"):
        pass
    with pytest.raises(LinearizeError, match="no converted layer"), surgery.mode(tiny.model(), "teacher"):
        pass


def test_fresh_mixers_come_and_go():
    model = surgery.convert(tiny.model(), tiny.LOLCATS)
    ids = tiny.tokens()
    with torch.no_grad():
        untrained = model(ids).logits
        tiny.randomize(layer.mixer for layer in surgery.converted(model))
        trained = model(ids).logits
        assert (trained - untrained).abs().max() > 1e-3
        with surgery.fresh_mixers(model):
            assert torch.equal(model(ids).logits, untrained)
        assert torch.equal(model(ids).logits, trained)


def test_hidden_states_are_still_recorded():
    model, teacher = surgery.convert(tiny.model(), tiny.SOFTMAX), tiny.model()
    ids = tiny.tokens()
    with torch.no_grad():
        ours, theirs = (m(ids, output_hidden_states=True).hidden_states for m in (model, teacher))
    assert len(ours) == len(theirs) == 5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_observer_sees_teacher_outputs_and_no_graph():
    model, teacher = surgery.convert(tiny.model(), tiny.LOLCATS), tiny.model()
    ids, mask, positions = tiny.left_padded()
    calls = []
    with surgery.observe(model, calls.append):
        out = model(ids, attention_mask=mask, position_ids=positions).logits
    with torch.no_grad():
        assert torch.equal(out, teacher(ids, attention_mask=mask, position_ids=positions).logits)
    assert [call.layer_idx for call in calls] == [0, 1, 2, 3]
    for call in calls:
        assert not any(x.requires_grad for x in (call.q, call.k, call.v, call.teacher, call.hidden_states))
        student = call.student()
        assert student.shape == call.teacher.shape
        assert student.requires_grad
        assert call.project(call.teacher).shape == call.hidden_states.shape
        teacher_weights, student_weights = call.weights(slice(10, 20))
        assert teacher_weights.shape == student_weights.shape == (2, 4, 10, 40)
        rebuilt = torch.einsum("bhrs,bshv->brhv", teacher_weights, call.v.repeat_interleave(2, dim=2))
        torch.testing.assert_close(rebuilt, call.teacher[:, 10:20], atol=1e-5, rtol=0)
