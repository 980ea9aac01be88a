"""Layers that attend within chunks (Llama 4): each chunk is a document, however the text is fed."""

from __future__ import annotations

import copy

import odd
import pytest
import tiny
import torch
from transformers import DynamicCache

import linearize
from linearize import surgery
from linearize.decode.choice import obstacles

MIXERS = {
    "softmax": tiny.SOFTMAX,
    "hedgehog": tiny.HEDGEHOG,
    "lolcats": tiny.LOLCATS,
    "terraced": {**tiny.HEDGEHOG, "window": {"name": "terraced", "size": 6}},
    "pinned": {"window": {"name": "sliding", "size": 5, "first": 2}},
    "convolved": {**tiny.HEDGEHOG, "short_conv": {"name": "depthwise"}, "window": {"name": "none"}},
}
mixers = pytest.mark.parametrize("mixer", MIXERS)


def converted(mixer, layers="all"):
    model = surgery.convert(odd.model("llama4_text"), MIXERS[mixer], layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


def fed(model, ids, mask, sizes):
    """Logits of a text that comes in calls of these sizes."""
    cache, first, found = DynamicCache(config=model.config), 0, []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for size in sizes:
        last = first + size
        given = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
        found.append(model(ids[:, first:last], past_key_values=cache, **given).logits)
        first = last
    return torch.cat(found, 1)


def test_the_plan_knows_chunks_and_counts_them_as_the_cache_does():
    model = odd.model("llama4_text")
    shapes = [layer.shape for layer in surgery.attention_layers(model)]
    assert [shape.chunk for shape in shapes] == [8, 8, 8, None]
    plan = surgery.plan(odd.config("llama4_text"), tiny.LOLCATS)
    assert [row.kv_window for row in plan.rows] == [8, 8, 8, None]


@mixers
@pytest.mark.parametrize("layers", ["all", [1, 3]], ids=str)
def test_a_row_is_itself_however_it_is_fed(mixer, layers):
    model = converted(mixer, layers)
    ids, mask, _ = tiny.left_padded(length=40)
    with torch.no_grad():
        expected = fed(model, ids, mask, [40])[mask.bool()]
        alone = model(ids[:1, 7:]).logits[0]
        torch.testing.assert_close(expected[:33], alone, atol=3e-5, rtol=0)
        for sizes in ([1] * 40, [11, 1, 1, 9, 1, 17], [8, 8, 8, 8, 8], [5] * 8):
            found = fed(model, ids, mask, sizes)[mask.bool()]
            torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


@mixers
def test_generation(mixer):
    model = converted(mixer)
    ids, mask, _ = tiny.left_padded(length=20)
    settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **settings)
    ways = [{}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 3}]
    if not transformers_has_no_static_chunks():
        ways.append({"cache_implementation": "static", "disable_compile": True})
    for way in ways:
        assert torch.equal(model.generate(ids, **settings, **way), expected), way


def transformers_has_no_static_chunks() -> bool:
    """Whether an untouched model with chunks has no static cache either: transformers 5.17 hands its masks too much."""
    ids, settings = tiny.tokens(1, 9), {"max_new_tokens": 2, "do_sample": False, "disable_compile": True}
    try:
        odd.model("llama4_text").generate(ids, cache_implementation="static", **settings)
    except TypeError:
        return True
    return False


def test_drafts_are_taken_back_over_the_end_of_a_chunk():
    model = converted("lolcats")
    assistant = copy.deepcopy(model)
    for parameter in assistant.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    ids, settings = tiny.tokens(1, 13), {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(model.generate(ids, **settings, assistant_model=assistant), expected)


def test_an_export_goes_on_in_chunks(tmp_path):
    model = converted("lolcats")
    linearize.save(model, tmp_path / "out")
    loaded = linearize.load(tmp_path / "out")
    ids = tiny.tokens(2, 20)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


def test_one_graph_of_steps_is_not_for_them():
    assert any("chunk" in problem for problem in obstacles(converted("hedgehog")))
