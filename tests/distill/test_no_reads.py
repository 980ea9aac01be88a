"""Nothing in a micro-step waits for the device or moves data from the host, so that a CUDA graph can hold it.

Micro-steps run on fake tensors of the meta device: what would look at numbers raises, and so does what mixes tensors of
the host in. Dispatch goes both ways, to the torch forms, and to the Triton kernels' registered shapes.
"""

from __future__ import annotations

from contextlib import ExitStack

import covering
import pytest
import torch
from on_paper import META, SIZES, OnDevice, on_paper, to_paper
from torch._subclasses.fake_tensor import DataDependentOutputException

from linearize import objectives, surgery
from linearize.bench.subjects import convert, random_model, subjects
from linearize.distill.finetune import predicts, teacher_predicts
from linearize.distill.transfer import transfer_step
from linearize.objectives.headless import recognize


def packed(tokens: int = 40) -> dict[str, torch.Tensor]:
    """Two rows of documents end to end."""
    ids = torch.ones(2, tokens, dtype=torch.int64, device=META)
    positions = torch.arange(tokens, device=META).repeat(2, 1) % 17
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


@pytest.mark.parametrize("name", covering.recipes(subjects()))
def test_of_every_recipe(name, monkeypatch):
    reads_nothing(name, True, monkeypatch)


@pytest.mark.parametrize("name", ["lolcats", "gla"])
def test_of_the_torch_forms(name, monkeypatch):
    reads_nothing(name, False, monkeypatch)


def reads_nothing(name, triton, monkeypatch):
    """Attention transfer where something trains there, and training of all weights on text and on the teacher."""
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **SIZES), name)
    head = recognize(model, torch.device("cpu"))
    assert head is not None
    trains = any(layer.mixer.added_parameters for layer in surgery.converted(model))
    with on_paper(monkeypatch, triton), ExitStack() as stack:
        to_paper(model)
        batch = packed()
        count = torch.ones((), dtype=torch.int64, device=META)
        stack.enter_context(surgery.trusting(model))
        stack.enter_context(OnDevice())
        if trains:
            losses = transfer_step(model, batch, {"attention_output": 1.0})
            assert losses.shape == (len(surgery.converted(model)),)
            assert all(p.grad is not None for x in surgery.converted(model)[:1] for p in x.mixer.parameters())
            model.zero_grad()
        theirs = teacher_predicts(model, batch, None, head)
        model.train()
        targets = objectives.next_targets(batch["labels"], batch["position_ids"])
        loss = objectives.token_backward(
            predicts(model, batch, head), targets, {"next_token": 1.0, "logits_kl": 1.0},
            teacher=theirs, count=count,
        )  # fmt: skip
        assert loss.shape == () and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["lolcats", "gated_delta_window"])
def test_of_steps_without_any_window(name, monkeypatch):
    """As `window_dropout` has them where its rate is one."""
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **SIZES), name)
    with on_paper(monkeypatch, True), ExitStack() as stack:
        to_paper(model)
        stack.enter_context(surgery.trusting(model))
        stack.enter_context(OnDevice())
        off = [True] * len(surgery.converted(model))
        losses = transfer_step(model, packed(), {"attention_output": 1.0}, window_off=off)
        assert losses.shape == (len(off),)


@pytest.mark.parametrize(
    ("name", "objective", "off"),
    [
        ("hedgehog", "attention_weights", False),
        ("hedgecats", "attention_weights", True),
        ("lolcats", "attention_weights", False),
        ("mohawk", "mixing_matrix", False),
        ("gdn2", "mixing_matrix", False),
    ],
)
def test_of_attention_weights(name, objective, off, monkeypatch):
    """By tiles of both matrices, and column by column."""
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **SIZES), name)
    with on_paper(monkeypatch, True), ExitStack() as stack:
        to_paper(model)
        stack.enter_context(surgery.trusting(model))
        stack.enter_context(OnDevice())
        layers = surgery.converted(model)
        losses = transfer_step(model, packed(80), {objective: 1.0}, window_off=[off] * len(layers))
        assert losses.shape == (len(layers),)
        assert all(any(p.grad is not None for p in x.mixer.parameters()) for x in layers)


def test_a_mask_that_is_not_trusted_is_looked_at(monkeypatch):
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **SIZES), "lolcats")
    with on_paper(monkeypatch, triton=False), pytest.raises(DataDependentOutputException):
        to_paper(model)
        transfer_step(model, packed(), {"attention_output": 1.0})
