"""Families with learned attention sinks: the teacher's logits join the window's sum of weights, in every form."""

from __future__ import annotations

import copy

import compositions
import families_configs
import pytest
import torch
from transformers import AutoModelForCausalLM

import linearize
from linearize import objectives, surgery
from linearize.config.schema import LoraConfig, StageConfig
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import transfer_step
from linearize.mixers import build

FULL = {"window": {"name": "full"}}
SLIDING = {"window": {"name": "sliding", "size": 5}, "feature_map": {"name": "hedgehog", "dim": 8}}
MIXERS = [
    FULL,
    SLIDING,
    {**SLIDING, "window": {"name": "sliding", "size": 5, "first": 3, "sinks": "learned"}},
    {**SLIDING, "window": {"name": "terraced", "size": 3}},
    {**SLIDING, "window": {"name": "sliding", "size": 5, "overlap": True}, "combine": {"name": "weighted"}},
    {"window": {"name": "sliding", "size": 5}},
    {"feature_map": {"name": "hedgehog", "dim": 8}},
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """GPT-OSS from a file, its sinks large enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(families_configs.tiny_config("gpt_oss"), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "sinks" in name else 0.0, std=0.15)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", MIXERS, ids=compositions.label)
def test_three_forms_agree_with_a_sink(mixer):
    made = compositions.make(mixer, compositions.SHAPES["grouped"], torch.float64)
    draw = compositions.Draw.of(made.shape, 24, torch.float64)
    sink = torch.linspace(-1, 2, made.shape.heads, dtype=torch.float64)
    expected = draw.run(made.parallel, sink=sink)
    torch.testing.assert_close(draw.run(made.chunked, sink=sink), expected)
    state = made.initial_state(2, torch.float64, torch.device("cpu"))
    parts = [draw[:10].run(made.chunked, state=state, sink=sink)]
    parts += [draw[t : t + 1].run(made.step, state=state, sink=sink) for t in range(10, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    changed = (expected - draw.run(made.parallel)).abs().max()
    assert (changed > 1e-3) == (made.window.size != 0), "a sink weighs wherever there is a softmax"


def test_sinks_add_up():
    """A window's own sink and the teacher's are two keys without values."""
    shape = compositions.SHAPES["grouped"]
    draw = compositions.Draw.of(shape, 12, torch.float64)
    plain = compositions.make({"window": {"name": "sliding", "size": 5}}, shape, torch.float64)
    own = compositions.make(
        {"window": {"name": "sliding", "size": 5, "sinks": "learned"}}, shape, torch.float64
    )
    given = torch.linspace(-1, 1, shape.heads, dtype=torch.float64)
    both = torch.logaddexp(own.window.sink_logit.detach(), given)
    torch.testing.assert_close(draw.run(own.chunked, sink=given), draw.run(plain.chunked, sink=both))


def test_identity_needs_the_sinks(teacher, ids):
    model = surgery.convert(copy.deepcopy(teacher), FULL)
    with torch.no_grad():
        expected = teacher(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=0)
        for layer in surgery.converted(model):
            layer.sinks.fill_(-1e9)
        assert (model(ids).logits - expected).abs().max() > 1e-2, "or this test could not fail"


def test_weights_and_gradients(teacher, ids):
    model = surgery.convert(copy.deepcopy(teacher), SLIDING)

    def observe(call) -> None:
        weights, student = call.weights(slice(0, ids.shape[1]))
        assert (weights.sum(-1) < 0.999).all(), "the sink keeps its share"
        v = call.v.repeat_interleave(call.q.shape[2] // call.v.shape[2], dim=2)
        torch.testing.assert_close(
            torch.einsum("bhts,bshv->bthv", weights, v), call.teacher, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            torch.einsum("bhts,bshv->bthv", student, v), call.student(), rtol=1e-4, atol=1e-5
        )

    with torch.no_grad(), surgery.observe(model, observe):
        model.base_model(input_ids=ids, use_cache=False)
    model = prepare(model, StageConfig(train=["mixers"]))
    for name in objectives.names("layer"):
        model.zero_grad()
        assert transfer_step(model, {"input_ids": ids}, {name: 1.0}).isfinite().all()
        assert all(parameter.grad is not None for parameter in trained(model).values()), name
    model = prepare(model, StageConfig(train=["all"]))
    model(ids).logits.square().mean().backward()
    assert all(layer.sinks.grad.abs().max() > 0 for layer in surgery.converted(model))
    # as a full window's blocks are computed again in the backward pass
    whole = surgery.convert(copy.deepcopy(teacher), FULL)
    grads = []
    for own in (teacher, whole):
        own.zero_grad()
        own(ids).logits.square().mean().backward()
        grads.append(torch.stack([layer.self_attn.sinks.grad for layer in own.model.layers]))
    teacher.zero_grad()
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-7)


def test_export_and_adapters(teacher, ids, tmp_path):
    model = surgery.convert(copy.deepcopy(teacher), SLIDING)
    for layer in surgery.converted(model):
        for parameter in layer.mixer.parameters():
            torch.nn.init.normal_(parameter)
    model = prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2)))
    model = model.merge_and_unload().eval()
    linearize.save(model, tmp_path / "out")
    loaded = linearize.load(tmp_path / "out", dtype=torch.float32)
    settings = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


def test_without_a_window_the_sink_is_left_out():
    mixer = build({"feature_map": {"name": "hedgehog", "dim": 8}}, compositions.SHAPES["grouped"])
    draw = compositions.Draw.of(mixer.shape, 6, torch.float32)
    sink = torch.full((mixer.shape.heads,), 3.0)
    torch.testing.assert_close(draw.run(mixer.chunked, sink=sink), draw.run(mixer.chunked))
