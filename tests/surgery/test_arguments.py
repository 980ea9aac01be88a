"""Arguments of the attention function: honored, without effect, or refused by name, in the probe and in real calls."""

from __future__ import annotations

import pytest
import tiny
import torch

from linearize import surgery
from linearize.errors import UnsupportedModelError
from linearize.mixers import LayerShape
from linearize.surgery import arguments

SHAPE = LayerShape(heads=4, kv_heads=2, key_dim=16, value_dim=16, scaling=0.25, sliding_window=9)


@pytest.mark.parametrize("name", arguments.WITHOUT_EFFECT)
def test_what_has_no_effect_is_let_through_and_has_none(name):
    assert arguments.refusal({name: torch.ones(2)}, tokens=3, mask=None) is None
    assert arguments.WITHOUT_EFFECT[name]


@pytest.mark.parametrize("name", [*arguments.CHANGES_RESULT, "temperature", "scaler", "is_sparse"])
@pytest.mark.parametrize("value", [torch.ones(2), False, 0, "x", [1]], ids=repr)
def test_everything_else_is_refused_by_name(name, value):
    assert f"'{name}'" in arguments.refusal({name: value}, tokens=3, mask=None)
    assert arguments.refusal({name: None}, tokens=3, mask=None) is None


def test_the_table_names_nothing_twice():
    honored = {"scaling", "softcap", "sliding_window", "is_causal"}
    assert not set(arguments.WITHOUT_EFFECT) & set(arguments.CHANGES_RESULT)
    assert not honored & (set(arguments.WITHOUT_EFFECT) | set(arguments.CHANGES_RESULT))


@pytest.mark.parametrize(
    ("value", "tokens", "mask", "refused"),
    [
        (True, 3, None, False),
        (None, 3, None, False),
        (False, 3, None, True),
        (False, 1, None, False),
        (False, 3, torch.ones(1, 1, 3, 3, dtype=torch.bool), False),
    ],
)
def test_not_causal_is_refused_where_no_mask_says_otherwise(value, tokens, mask, refused):
    assert (arguments.refusal({"is_causal": value}, tokens=tokens, mask=mask) is not None) == refused


def test_masks_of_several_heads_and_biases():
    assert "4 heads" in arguments.refusal({}, tokens=3, mask=torch.zeros(1, 4, 3, 3))
    assert arguments.refusal({}, tokens=3, mask=torch.zeros(2, 1, 3, 3)) is None
    lowest = torch.finfo(torch.float32).min
    assert arguments.bias_refusal(torch.tensor([0.0, lowest, -1e4, -1e9, -torch.inf])) is None
    assert "0.5" in arguments.bias_refusal(torch.tensor([0.0, 0.5, lowest]))
    assert "-3" in arguments.bias_refusal(torch.tensor([0.0, -3.0]))
    assert arguments.bias_refusal(torch.ones(1, 1, 2, 2, dtype=torch.bool)) is None


@pytest.mark.parametrize(
    ("given", "name"),
    [({"scaling": 0.5}, "scaling"), ({"softcap": 3.0}, "softcap"), ({"sliding_window": 8}, "sliding_window")],
)
def test_a_number_that_differs_from_the_built_one_is_named(given, name):
    right = {"scaling": 0.25, "sliding_window": 9}
    assert arguments.changed(right, SHAPE) is None
    assert arguments.changed({"sliding_window": 9}, SHAPE) is None, (
        "no scaling is one over the root of the width"
    )
    assert name in arguments.changed({**right, **given}, SHAPE)


@pytest.mark.parametrize("value", [torch.ones(()), True, "9", 2.5])
def test_a_window_that_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="sliding_window is no plain number"):
        arguments.numbers({"sliding_window": value}, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"indices": torch.zeros(1, 4)}, "keys chosen by an index"),
        ({"temperature": 2.0}, r"'temperature' \(2.0\), which linearize does not know"),
        ({"is_causal": False}, "not causal"),
        ({"softcap": 1.0}, "softcap=1.0, but was converted with softcap=None"),
    ],
)
def test_real_calls_are_held_to_the_same_table(given, message):
    """What a caller gives to `forward` reaches the attention function, long after the probe."""
    model = surgery.convert(tiny.model(), tiny.LOLCATS)
    ids = tiny.tokens(1, 12)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(UnsupportedModelError, match=f"layer 0 .*{message}"):
            model(ids, **given)
        harmless = {"num_items_in_batch": torch.tensor(3), "seq_idx": torch.zeros(1, 12), "max_length_q": 12}
        assert torch.equal(model(ids, **harmless).logits, expected)


def test_a_mask_of_several_heads_is_refused_in_a_real_call():
    model = surgery.convert(tiny.model(), tiny.LOLCATS)
    mask = torch.ones(1, 4, 12, 12).tril().bool()
    with pytest.raises(UnsupportedModelError, match="mask has 4 heads"), torch.no_grad():
        model(tiny.tokens(1, 12), attention_mask=mask)
