"""Micro-steps as a GPU runs them, masks trusted and blocks traced, give what plain ones give, on every family."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from linearize import objectives, surgery
from linearize.config.schema import LoraConfig, RunConfig, StageConfig
from linearize.distill import blocks
from linearize.distill import passes as passes_of_a_stage
from linearize.distill.finetune import predict, predict_teacher
from linearize.distill.passes import Passes
from linearize.distill.trainable import prepare, trained
from linearize.mixers import compiled as compiled_mixers

CPU = torch.device("cpu")
QUICK = ("llama", "gemma2", "mixtral")
"""Families of every run; sliding layers, a dropout, fused projections and experts among them."""


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch):
    """Tracing is what can fail; the compiler of the CPU would take minutes."""
    monkeypatch.setattr(compiled_mixers, "BACKEND", "eager")
    torch._dynamo.reset()


def batch(turn: int, *, documents: bool) -> dict[str, torch.Tensor]:
    """Two rows, of several documents or of one."""
    ids = torch.randint(
        0, int(tiny.tokens().max()) + 1, (2, 48), generator=torch.Generator().manual_seed(turn)
    )
    positions = torch.arange(48).repeat(2, 1)
    if documents:
        positions = torch.stack([positions[0] % (11 + turn), positions[1] % (30 - turn)])
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def stepping(model):
    """A micro-step on text and teacher."""

    def step(part, count, off=()):
        teacher = predict_teacher(model, part)
        model.train()
        targets = objectives.next_targets(part["labels"], part["position_ids"])
        loss = objectives.token_backward(
            predict(model, part), targets, {"next_token": 1.0, "logits_kl": 1.0}, teacher=teacher
        )
        return loss[None]

    return step


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in tiny.FAMILIES],
)
def test_equal_to_plain_ones(family, caplog):
    made = tiny.model(family)
    stage = StageConfig(train=["mixers", "lora"], lora=LoraConfig(rank=2))
    model = prepare(surgery.convert(made, tiny.LOLCATS, "all"), stage)
    step = stepping(model)
    passes = Passes(
        model, "probe", stage, RunConfig(device="cpu", compile="always"), CPU, 1,
        list(trained(model).values()), lambda: blocks.repeated(model),
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        for turn in range(4):
            # the first is looked at; afterwards rows of one document come as well
            part = batch(turn, documents=turn != 2)
            model.zero_grad()
            torch.manual_seed(turn)  # some families have dropout
            losses = passes(step, part, None)
            found = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
            model.zero_grad()
            torch.manual_seed(turn)
            torch.testing.assert_close(losses, step(part, None), rtol=1e-4, atol=1e-5)
            for name, p in trained(model).items():
                if name in found:
                    torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=1e-5, msg=name)
    if passes.blocks.obstacle is not None:
        assert "are not compiled" in caplog.text or not passes.blocks.layers


def test_long_texts_have_no_masks_that_they_do_not_need(monkeypatch, caplog):
    """Those of one document none, those of several the masks of ever; both give what plain steps give."""
    monkeypatch.setattr(passes_of_a_stage, "MASK", 2 * 48**2 - 1)
    model = surgery.convert(tiny.model("llama"), tiny.LOLCATS, "all")
    stage = StageConfig(train=["mixers"])
    model = prepare(model, stage)
    seen, steps = [], stepping(model)
    made = masking_utils.create_causal_mask

    def noted(*args, **given):
        seen.append(made(*args, **given))
        return seen[-1]

    monkeypatch.setattr(modeling_llama, "create_causal_mask", noted)
    passes = Passes(
        model, "probe", stage, RunConfig(device="cpu"), CPU, 1, list(trained(model).values()), list
    )
    passes.captured.obstacle = None  # as on a GPU
    caplog.set_level(logging.INFO)
    for documents in (True, False, True):
        given = batch(1, documents=documents)
        expected = steps(given, None)
        seen.clear()
        torch.testing.assert_close(passes(steps, given, None), expected)
        assert [mask is None for mask in seen] == [not documents] * len(seen) and seen
    assert passes.captured.obstacle and "made only where they are needed" in caplog.text


def test_where_nothing_is_asked_for_nothing_is_trusted(monkeypatch):
    """Padding may come in any batch."""
    model = surgery.convert(tiny.model("llama"), tiny.LOLCATS, "all")
    passes = Passes(model, "probe", StageConfig(), RunConfig(device="cpu"), CPU, 10_000, [], list)
    trusted = []

    def step(part, count, off=()):
        trusted.append(surgery.converted(model)[0].linearize_switch.trusts)
        return torch.ones(1)

    text = batch(0, documents=True)
    padded = {**text, "attention_mask": torch.ones(2, 48, dtype=torch.int64)}
    for part in (padded, text, text, padded, text):
        passes(step, part, None)
    assert trusted == [False, False, True, False, True]
