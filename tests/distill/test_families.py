"""Both kinds of stages on every family: gradients reach what trains; an adapted model still holds its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from byte_llama import byte_tokenizer
from transformers import FuyuConfig, FuyuForCausalLM

from linearize import distill, objectives, surgery
from linearize.config.schema import LoraConfig, Recipe, StageConfig
from linearize.distill.finetune import predict, predict_teacher
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import transfer_step


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transfer_then_adapters(family: str) -> None:
    ids = tiny.tokens()
    batch = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids), "labels": ids}
    untouched = tiny.model(family)
    with torch.no_grad():
        original = predict(untouched, batch)

    model = prepare(surgery.convert(tiny.model(family), tiny.LOLCATS, "all"), StageConfig(train=["mixers"]))
    for name in objectives.names("layer"):
        model.zero_grad()
        losses = transfer_step(model, batch, {name: 1.0})
        assert losses.isfinite().all() and (losses > 0).all()
        assert all(parameter.grad is not None for parameter in trained(model).values()), name

    model = prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2)))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter)
    teacher = predict_teacher(model, batch)
    assert torch.equal(teacher, original)
    logits = predict(model, batch)
    assert not torch.allclose(logits, original, atol=1e-2)
    targets = objectives.next_targets(ids, batch["position_ids"])
    objectives.token_backward(logits, targets, {"next_token": 1.0, "logits_kl": 1.0}, teacher=teacher)
    assert all(parameter.grad is not None for parameter in trained(model).values())


def test_a_config_of_several_models_is_trained_and_says_nothing_new(
    make_recipe: Callable[..., Recipe], tmp_path: Path, pictures_unrendered: None
) -> None:
    """Fuyu's has no word on caches, for which `run` ended in a traceback, and keeps none from Trainer."""
    text = {**tiny.COMMON, "vocab_size": 300, "num_hidden_layers": 2}
    FuyuForCausalLM(FuyuConfig(text_config=text, vocab_size=300)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    recipe = make_recipe(tokens=2 * 2 * 64)
    recipe.eval.ablations = False
    distill.run(str(tmp_path / "model"), recipe, tmp_path / "run")
    assert "use_cache" not in json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_teacher_weights_give_the_teacher_output(family: str) -> None:
    """What attention_weights imitates is what the model computes, sliding layers and soft caps included."""
    model = surgery.convert(tiny.model(family), tiny.LOLCATS, "all")
    ids = tiny.tokens()

    def observe(call) -> None:
        teacher, student = call.weights(slice(0, ids.shape[1]))
        v = call.v.repeat_interleave(call.q.shape[2] // call.v.shape[2], dim=2)
        torch.testing.assert_close(
            torch.einsum("bhts,bshv->bthv", teacher, v), call.teacher, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            torch.einsum("bhts,bshv->bthv", student, v), call.student(), rtol=1e-4, atol=1e-5
        )

    with torch.no_grad(), surgery.observe(model, observe):
        model.base_model(input_ids=ids, use_cache=False)
