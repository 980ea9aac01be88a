"""Training where layers have mixers of their own: some have nothing to train, some have both branches, some neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from byte_llama import byte_tokenizer, tiny_llama
from mixed import LAYERS, MIXER, MIXERS, mixed
from torch._dynamo.utils import counters

import linearize
from linearize import distill, objectives, surgery
from linearize.config.schema import RunConfig, StageConfig
from linearize.distill import blocks
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import TransferTrainer, transfer_step
from linearize.errors import RecipeError
from linearize.eval import ablation
from linearize.mixers import compiled as compiled_mixers
from linearize.models import load_teacher

SIX = [0, 1, 3, 4, 5]
IDLE = {"attention_output": {1}, "attention_weights": {1, 3}, "mixing_matrix": {1, 3}}
"""Objective -> layers without a parameter that has a part in it: a window alone, an output gate behind the weights."""


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": tiny.tokens(), "position_ids": torch.arange(40).repeat(2, 1) % 23}


@pytest.mark.parametrize("objective", IDLE)
def test_every_layer_has_a_loss_and_those_with_parameters_a_gradient(objective):
    model = prepare(mixed(), StageConfig(train=["mixers"]))
    losses = transfer_step(model, batch(), {objective: 1.0})
    assert len(losses) == len(SIX) and losses.isfinite().all()
    expected: dict[int, torch.Tensor] = {}
    with surgery.observe(
        model,
        lambda call: expected.update({call.layer_idx: objectives.layer_backward(call, {objective: 1.0})}),
    ):
        model.base_model(**batch(), use_cache=False)
    torch.testing.assert_close(losses, torch.stack([expected[index] for index in SIX]))
    reached = {int(name.split(".")[2]) for name, p in trained(model).items() if p.grad is not None}
    assert reached == set(SIX) - IDLE[objective]


def trainer(model: Any, folder: Path, **changes: Any) -> TransferTrainer:
    stage = StageConfig(objective={"attention_output": 1.0}, tokens=80, batch_size=2, **changes)
    return TransferTrainer(
        prepare(model, stage), name="transfer", stage=stage, run=RunConfig(device="cpu"), folder=folder,
        dataset=[batch()], length=40, seed=3, device=torch.device("cpu"), autocast=None,
    )  # fmt: skip


def test_windows_are_dropped_where_there_are_both_branches(tmp_path):
    made = trainer(mixed(), tmp_path, window_dropout=0.999)
    assert made._draw_windows().off == [False, False, False, True, False]
    alone = surgery.convert(tiny.model(num_hidden_layers=6), MIXER, {"use": {"window": [1]}, "keep": [2]}, {
        "window": MIXERS["window"],
    })  # fmt: skip
    with pytest.raises(RecipeError, match="the mixer has one branch alone"):
        trainer(alone, tmp_path, window_dropout=0.5)


def test_a_stage_that_reaches_nothing_is_refused(tmp_path):
    """An output gate has no part in the weights."""
    gated = {
        "feature_map": {"name": "none"},
        "window": {"name": "sliding", "size": 6},
        "output": {"name": "gate"},
    }
    stage = {"objective": {"attention_weights": 1.0}}
    made = trainer(surgery.convert(tiny.model(), gated), tmp_path)
    made.stage.objective = stage["objective"]
    with pytest.raises(
        RecipeError, match=r"stages\.transfer\.objective: attention_weights reaches no parameter"
    ):
        made.micro_step(made.trained_model, batch(), None)


def test_layers_of_one_mixer_share_what_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled_mixers, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    model = mixed().eval()
    expected = model(**batch(), use_cache=False).logits
    compiled = blocks.Blocks(blocks.repeated(model), "probe")
    with surgery.trusting(model), compiled.compiled():
        for _ in range(2):
            found = model(**batch(), use_cache=False).logits
    assert compiled.obstacle is None
    # two linear layers, the window, softmax without rotation, both branches, and the kept layer
    assert len(compiled._calls) == 5 == counters["stats"]["unique_graphs"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_ablations_switch_what_there_is():
    model = mixed()
    found = ablation.ablate(model, lambda: model(tiny.tokens()).logits.detach().sum().item())
    assert list(found) == [ablation.TEACHER, ablation.NO_LINEAR, ablation.NO_WINDOW, ablation.UNTRAINED]
    assert len(set(found.values())) == 4


def test_a_run(make_recipe, tmp_path):
    """Transfer and LoRA, plan and report by mixer, export; and the run goes on from its folder."""
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    tiny_llama(6).save_pretrained(teacher)
    byte_tokenizer().save_pretrained(teacher)
    recipe = make_recipe(window_dropout=0.0)
    recipe.mixer, recipe.mixers, recipe.layers = MIXER, MIXERS, LAYERS
    out = tmp_path / "run"
    summary = distill.run(str(teacher), recipe, out, recipe_name="mixed")
    rows = {row["name"]: row["perplexity"]["held-out"] for row in summary.rows}
    assert rows["after recover"] < rows["swapped, untrained"] and "window off" in rows
    plan = json.loads((out / "plan.json").read_text())
    assert [row["mixer"] for row in plan["rows"]] == ["default", "window", None, "nope", "both", "default"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {len(line["layers"]) for line in lines if "layers" in line} == {len(SIX)}
    report = (out / "report.md").read_text()
    assert "layers 0, 5" in report and "window: sliding 6, first 2" in report
    model = linearize.load(summary.checkpoint)
    assert [layer.mixer.composition for layer in surgery.converted(model)] == [
        layer.mixer.composition for layer in surgery.converted(surgery.convert(
            load_teacher(str(teacher), dtype=torch.float32, device="cpu")[0], MIXER, LAYERS, MIXERS))
    ]  # fmt: skip
    (out / "done.json").unlink()
    again = distill.run(str(teacher), recipe, out, recipe_name="mixed", resume=True)
    assert again.rows == summary.rows
