"""Groups of parameters in a stage: frozen roles, the mixers' own rate, embeddings apart for a while."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from byte_llama import MIXER, byte_tokenizer, tiny_llama
from safetensors.torch import load_file

import linearize
from linearize import distill, surgery
from linearize.config.schema import LoraConfig, Recipe, StageConfig
from linearize.distill.optimizer import build_optimizer
from linearize.distill.stage import StageTrainer
from linearize.distill.trainable import mixer_parameters, prepare, trained
from linearize.distill.tying import untied
from linearize.errors import RecipeError

ATTENTION = re.compile(
    r".*\.(self_attn|attn|attention)\.\w*(proj|c_attn|query_key_value|dense)\w*\.(weight|bias)"
)


# Frozen roles


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_roles_cover_everything_but_attention(family: str) -> None:
    model = surgery.convert(tiny.model(family), tiny.LOLCATS, [0, 2])

    def training(freeze: list[str]) -> set[str]:
        return set(trained(prepare(model, StageConfig(train=["all"], freeze=freeze))))

    everything = training([])
    assert everything == {name for name, _ in model.named_parameters()}
    left_out = {role: everything - training([role]) for role in ("embeddings", "norms", "mlp")}
    assert all(
        "embed" in name or "wte" in name or "wpe" in name or "head" in name for name in left_out["embeddings"]
    )
    assert all("norm" in name or "ln_" in name for name in left_out["norms"])
    assert all("mlp" in name or "feed_forward" in name for name in left_out["mlp"])
    for layer in range(4):  # the kept ones too
        assert any(f".{layer}." in name for name in left_out["mlp"])
        assert any(f".{layer}." in name for name in left_out["norms"])
    rest = training(["mlp", "norms", "embeddings"])
    assert rest == everything - set.union(*left_out.values())
    assert all(ATTENTION.fullmatch(name) or ".mixer." in name for name in rest)
    assert any(".mixer." in name for name in rest)


def test_a_role_that_is_not_there_is_refused() -> None:
    model = surgery.convert(tiny_llama(), MIXER, "all")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(RecipeError, match=r"freeze: mlp: Linearized\w+ has no such parameters"):
        prepare(model, StageConfig(train=["all"], freeze=["mlp"]))


def test_roles_are_found_inside_an_adapted_model() -> None:
    model = surgery.convert(tiny_llama(), MIXER, "all")
    model = prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2)))
    names = trained(prepare(model, StageConfig(train=["all"], freeze=["embeddings", "mlp"])))
    assert names and not any(
        "embed" in name or "mlp" in name or "head" in name or "lora" in name for name in names
    )


# The mixers' own rate


def test_groups_of_the_optimizer() -> None:
    model = prepare(surgery.convert(tiny_llama(), MIXER, "all"), StageConfig(train=["all"]))
    mixers = mixer_parameters(model)
    stage = StageConfig(lr=1e-4, lr_mixers=1e-2, weight_decay=0.1)
    groups = build_optimizer(trained(model), stage, fused=False, mixers=mixers).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-4, 0.1),
        (1e-4, 0.0),
        (1e-2, 0.1),
        (1e-2, 0.0),
    ]
    assert {id(p) for group in groups[2:] for p in group["params"]} == mixers
    assert sum(len(group["params"]) for group in groups) == len(trained(model))
    same = build_optimizer(trained(model), StageConfig(lr=1e-2, lr_mixers=1e-2), fused=False, mixers=mixers)
    assert sum(len(group["params"]) for group in same.param_groups) == len(trained(model))


def test_both_rates_follow_the_schedule(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe()
    recipe.stages = {
        "full": StageConfig(
            objective={"next_token": 1.0},
            tokens=5 * 2 * 64,
            batch_size=2,
            lr=1e-4,
            lr_mixers=1e-2,
            train=["all"],
            log_every=1,
        )
    }
    recipe.eval.ablations = False
    distill.run(str(teacher_folder), recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr_mixers"] / line["lr"] for line in lines] == pytest.approx([100] * 5)
    assert lines[-1]["lr"] == pytest.approx(1e-5)


# Embeddings apart


def test_untied_inside_and_tied_again() -> None:
    model = surgery.convert(tiny.model("smollm3"), tiny.LOLCATS, "all")
    table = model.get_input_embeddings().weight
    ids = tiny.tokens()
    with torch.no_grad():
        before = model(ids).logits
    with untied(model):
        assert model.lm_head.weight is not table and torch.equal(model.lm_head.weight, table)
        assert "lm_head.weight" in dict(model.named_parameters())
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)
            model.lm_head.weight.add_(1.0)
        assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is table and model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    with pytest.raises(ZeroDivisionError), untied(model):
        raise ZeroDivisionError
    assert model.lm_head.weight is table


@pytest.mark.parametrize(("family", "on"), [("llama", True), ("smollm3", False)])
def test_nothing_to_untie(family: str, on: bool) -> None:
    model = tiny.model(family)
    head, flag = model.lm_head.weight, model.config.tie_word_embeddings
    with untied(model, on):
        assert model.lm_head.weight is head and model.config.tie_word_embeddings == flag


def test_the_trained_head_is_thrown_away(
    tied_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table moves by its own gradient alone, and the export holds one table."""
    recipe = make_recipe()
    recipe.stages = {
        "full": StageConfig(
            objective={"next_token": 1.0}, tokens=2 * 2 * 64, batch_size=2, lr=1e-2, train=["all"], untie=True
        )
    }
    recipe.eval.ablations = False
    heads = []
    original = StageTrainer._clip_grad_norm

    def clip(self, model):
        heads.append(self.parameters["lm_head.weight"])
        return original(self, model)

    monkeypatch.setattr(StageTrainer, "_clip_grad_norm", clip)
    summary = distill.run(str(tied_folder), recipe, tmp_path / "run")
    final = load_file(tmp_path / "run" / "stage-1-full" / "final.safetensors")
    exported = linearize.load(summary.checkpoint)
    assert exported.config.tie_word_embeddings
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert torch.equal(exported.lm_head.weight, final["model.embed_tokens.weight"])
    assert not torch.equal(heads[-1], final["model.embed_tokens.weight"])
    before = load_file(tied_folder / "model.safetensors")["model.embed_tokens.weight"]
    table = final["model.embed_tokens.weight"]
    assert not torch.equal(table, before)
    # tokens that the text does not hold have a gradient through the head alone
    byte_level = byte_tokenizer().get_vocab()
    read = {byte_level[symbol] for symbol in byte_level if symbol in string.printable or symbol == "\u0120"}
    unread = [token for token in range(256) if token not in read]
    assert len(unread) > 100 and torch.equal(table[unread], before[unread])
    assert not torch.equal(heads[-1][unread], before[unread])
