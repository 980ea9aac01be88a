"""What a plan counts: caches as the teacher keeps them, states, and the layers that hold no attention."""

from __future__ import annotations

import odd
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linearize import surgery
from linearize.cli.inspection import table, totals
from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.surgery.plan import Plan, Row


def row(layer, state, per_token, window=None, kind="mixer"):
    return Row(layer, f"layers.{layer}", kind, 4, 2, 8, 0, state, per_token, window)


def brute(rows, state, limit=5000):
    for length in range(limit):
        if sum(row.kv_bytes(length) for row in rows) >= state:
            return length
    return None


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, 1000, 10)],
        [row(0, 1001, 10)],
        [row(0, 1000, 10, 100)],
        [row(0, 1001, 10, 100)],
        [row(0, 1000, 10, 50), row(1, 1000, 10)],
        [row(0, 1000, 10, 50), row(1, 1000, 10, 70)],
        [row(0, 1000, 10, 150), row(1, 1000, 7, 40), row(2, 1000, 3)],
        [row(0, 700, 10, 64), row(1, 700, 10, 64), row(2, 5, 1, 9)],
        [row(0, 0, 10)],
    ],
)
def test_break_even_is_the_first_length_at_which_the_caches_are_as_large(rows):
    state = sum(row.state_bytes for row in rows)
    assert Plan(rows).break_even == brute(rows, state)
    for single in rows:
        assert single.break_even == brute([single], single.state_bytes)


def test_a_sliding_teacher_is_counted_by_its_windows():
    config = tiny.config(
        "gemma3", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, head_dim=8
    )
    plan = surgery.plan(config, tiny.LOLCATS)
    assert [row.kv_window for row in plan.rows] == [8, None, 8, None]
    per_token = plan.rows[0].kv_bytes_per_token
    assert plan.rows[0].kv_bytes(100) == 8 * per_token
    assert plan.rows[1].kv_bytes(100) == 100 * per_token
    assert plan.rows[0].break_even is None, "this state never beats eight tokens"
    assert plan.break_even == brute(plan.rows, plan.state_bytes)
    text = "\n".join(totals(plan, 100))
    assert "2 of the layers keep at most 8 tokens" in text
    assert "not in layers 0, 2: a state of" in text
    assert f"break-even  {plan.break_even:,} tokens" in text
    assert table(plan).row_count == 2
    written = plan.to_dict()
    assert written["break_even"] == plan.break_even and written["layers"][0]["kv_window"] == 8


def test_a_teacher_of_windows_alone_never_breaks_even():
    plan = surgery.plan(tiny.config("mistral"), tiny.LOLCATS)
    assert plan.break_even is None
    assert "break-even  never" in "\n".join(totals(plan, 1000))


@pytest.mark.parametrize(
    ("family", "others"),
    [
        ("bamba", {"model.layers.0": "BambaMixer", "model.layers.2": "BambaMixer"}),
        ("lfm2", {"model.layers.0": "Lfm2ShortConv", "model.layers.2": "Lfm2ShortConv"}),
        (
            "qwen3_next",
            {"model.layers.0": "Qwen3NextGatedDeltaNet", "model.layers.2": "Qwen3NextGatedDeltaNet"},
        ),
        ("falcon_h1", {}),
        ("opt", {}),
    ],
)
def test_layers_that_are_no_attention_are_named(family, others):
    plan = surgery.plan(odd.config(family), tiny.LOLCATS)
    assert plan.others == others
    lines = [line for line in totals(plan) if line.startswith("left as is")]
    assert len(lines) == len(set(others.values()))
    for name in set(others.values()):
        assert f"0, 2 of the model's layers hold no attention ({name})" in lines[0]


def test_a_plan_of_a_loaded_model_is_the_plan_of_its_config():
    model = tiny.model("gemma3")
    assert surgery.plan(model, tiny.LOLCATS).to_dict() == surgery.plan(model.config, tiny.LOLCATS).to_dict()
    assert not surgery.converted(model)


GPTJ = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
CODEGEN = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}


@pytest.mark.parametrize("where", ["window", "recurrent"])
@pytest.mark.parametrize(("family", "sizes"), [("gptj", GPTJ), ("codegen", CODEGEN)])
def test_a_plan_says_that_a_rotation_cannot_be_taken_back(family, sizes, where):
    """Told by `convert` alone, it would come behind the teacher's own text and its evaluation."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes), dtype=torch.float32
    ).eval()
    window = {"name": "sliding", "size": 6, "overlap": True}
    mixer = {**tiny.HEDGEHOG, "window": window, "position": {"name": "rope", where: False}}
    kept = {"turned": {"position": {where: True}}}
    for act in (surgery.plan, surgery.convert):
        with pytest.raises(UnsupportedModelError, match="cannot be rotated back; leave the rotation on"):
            act(model, mixer)
    errors: list[LinearizeError] = []
    plan = surgery.plan(model, mixer, {"use": {"turned": [0]}}, errors=errors, mixers=kept)
    assert len(plan.converted) == 2 and [plan.rows[1].path in str(error) for error in errors] == [True]
    surgery.plan(model, mixer, {"keep": [0], "use": {"turned": [1]}}, mixers=kept)
    assert not surgery.converted(model)
