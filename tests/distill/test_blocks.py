"""Compiled blocks give what their parts give, layers share what is compiled, and what cannot be compiled goes on."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from linearize import objectives, surgery
from linearize.bench.subjects import convert, random_model
from linearize.distill import blocks
from linearize.distill.finetune import predicts, teacher_predicts
from linearize.distill.transfer import transfer_step
from linearize.distill.window_dropout import windows_off
from linearize.mixers import compiled as compiled_mixers
from linearize.objectives.headless import recognize
from linearize.patch import changed

LAYERS = 3
"""A first one, and two that share what is compiled."""
SIZES = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": LAYERS}


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch):
    """Tracing is what can fail; the compiler of the CPU would take minutes."""
    monkeypatch.setattr(compiled_mixers, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


def packed() -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": torch.arange(40).repeat(2, 1) % 17, "labels": ids}


def step(model, head) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    batch = packed()
    model.zero_grad()
    theirs = teacher_predicts(model, batch, None, head)
    model.train()
    targets = objectives.next_targets(batch["labels"], batch["position_ids"])
    loss = objectives.token_backward(
        predicts(model, batch, head), targets, {"next_token": 1.0, "logits_kl": 1.0}, teacher=theirs
    )
    return loss, {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "recipe", ["lolcats", "gated_delta_window", pytest.param("arwkv", marks=pytest.mark.slow), "softmax"]
)
def test_equal_to_their_parts(recipe):
    model = convert(random_model("cpu", torch.float32, "tiny", **SIZES), recipe)
    head = recognize(model, torch.device("cpu"))
    loss, gradients = step(model, head)
    compiled = blocks.Blocks(blocks.repeated(model), "probe")
    assert len(compiled.layers) == LAYERS
    with surgery.trusting(model), compiled.compiled():
        for _ in range(2):
            other, found = step(model, head)
    assert compiled.obstacle is None
    handing = any(layer.linearize_hands for layer in surgery.converted(model))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (4 if handing else 2), (
        "one of the student, one of the teacher, and those of a first layer"
    )
    torch.testing.assert_close(other, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert not any("forward" in vars(layer) for layer in compiled.layers)


def test_windows_that_the_device_says_are_off():
    """Layers and steps share one graph of the student, whichever windows are drawn."""
    model = convert(random_model("cpu", torch.float32, "tiny", **SIZES), "hedgecats")
    head, layers = recognize(model, torch.device("cpu")), surgery.converted(model)
    compiled = blocks.Blocks(blocks.repeated(model), "probe")
    for off in ([True, False, True], [False, True, False]):
        with windows_off(layers, off):
            loss, gradients = step(model, head)
        with surgery.trusting(model), compiled.compiled(), windows_off(layers, torch.tensor(off).unbind()):
            other, found = step(model, head)
        torch.testing.assert_close(other, loss)
        for name, gradient in found.items():
            given = torch.zeros_like(gradient) if gradients[name] is None else gradients[name]
            torch.testing.assert_close(gradient, given, rtol=1e-3, atol=1e-6, msg=name)
    assert compiled.obstacle is None and counters["stats"]["unique_graphs"] == 2


def test_what_cannot_be_compiled_goes_on(caplog):
    model = random_model("cpu", torch.float32, "tiny", **SIZES)
    head = recognize(model, torch.device("cpu"))
    batch = packed()
    expected = predicts(model, batch, head).hidden

    class Looking(type(model.model.layers[0].mlp)):
        def forward(self, x):
            torch._dynamo.graph_break()  # as where an answer of the device decides what follows
            return super().forward(x)

    for layer in model.model.layers:
        layer.mlp.__class__ = Looking
    compiled = blocks.Blocks(blocks.repeated(model), "probe")
    with caplog.at_level(logging.INFO), compiled.compiled():
        found = predicts(model, batch, head).hidden
    assert compiled.obstacle is not None and "not compiled" in caplog.text
    torch.testing.assert_close(found, expected)


def test_a_size_that_torch_compiles_no_more_runs_by_parts(caplog):
    model = random_model("cpu", torch.float32, "tiny", **SIZES)
    head = recognize(model, torch.device("cpu"))
    compiled = blocks.Blocks(blocks.repeated(model), "probe")
    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level(logging.INFO):
        for tokens in (8, 9, 10, 11, 8):
            batch = {name: x[:, :tokens] for name, x in packed().items()}
            expected = predicts(model, batch, head).hidden
            with compiled.compiled():
                torch.testing.assert_close(predicts(model, batch, head).hidden, expected)
    assert compiled.full and compiled.obstacle is None
    assert caplog.text.count("compiled for no more sizes") == 1 and counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("how", ["forward", "hook"])
def test_where_somebody_else_is_blocks_are_left_alone(how):
    model = random_model("cpu", torch.float32, "tiny", **SIZES)
    assert len(blocks.repeated(model)) == LAYERS
    if how == "forward":
        model.model.layers[1].forward = model.model.layers[1].forward
    else:
        model.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: None)
    assert blocks.repeated(model) == []
    assert blocks.Blocks(blocks.repeated(model), "probe").obstacle is not None


def test_transfer_with_what_stands_around_the_attention():
    """Losses and gradients of the layers are those of the parts; norms, MLPs, rotation and loss are compiled."""
    model = convert(random_model("cpu", torch.float32, "tiny", **SIZES), "lolcats")
    model.requires_grad_(False)
    for layer in surgery.converted(model):
        layer.mixer.requires_grad_(True)
    expected = transfer_step(model, packed(), {"attention_output": 1.0})
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    parts = blocks.around_attention(model)
    assert {type(part).__name__ for part in parts} == {"LlamaRMSNorm", "LlamaMLP"} and len(
        parts
    ) == 3 * LAYERS
    functions = [*blocks.rotary(model), (objectives.layer, "joined")]
    before = [getattr(owner, name) for owner, name in functions]
    assert len(functions) == 2
    compiled = blocks.Blocks([*parts, *functions], "probe")
    model.zero_grad()
    with surgery.trusting(model), compiled.compiled():
        found = transfer_step(model, packed(), {"attention_output": 1.0})
    assert compiled.obstacle is None and counters["stats"]["unique_graphs"] == 4
    assert [getattr(owner, name) for owner, name in functions] == before
    torch.testing.assert_close(found, expected)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_function_that_cannot_be_compiled_goes_on(caplog):
    """It alone: the others stay compiled."""
    model = convert(random_model("cpu", torch.float32, "tiny", **SIZES), "lolcats")
    expected = transfer_step(model, packed(), {"attention_output": 1.0})
    joined = objectives.layer.joined

    def asks(shared, call, student):
        assert float(student.square().sum()) > 0  # of a number that only the device knows
        return joined(shared, call, student)

    parts = [*blocks.around_attention(model), *blocks.rotary(model), (objectives.layer, "joined")]
    compiled = blocks.Blocks(parts, "probe")
    with changed(objectives.layer, "joined", asks), caplog.at_level(logging.INFO):
        for _ in range(2):
            with surgery.trusting(model), compiled.compiled():
                found = transfer_step(model, packed(), {"attention_output": 1.0})
    assert compiled.obstacle is None and counters["stats"]["unique_graphs"] == 3
    assert [line for line in caplog.messages if "joined is not compiled" in line] == caplog.messages
    assert len(caplog.messages) == 1
    torch.testing.assert_close(found, expected)
