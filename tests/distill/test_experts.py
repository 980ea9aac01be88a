"""Mixtures of experts: in shards as in one process, experts as they were, routers in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import odd
import pytest
import shard_jobs
import tiny
import torch
from byte_llama import byte_tokenizer
from several import run, start, whole
from several_recipes import assert_equal, enough_cards, once
from transformers import AutoModelForCausalLM, LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

import linearize
from linearize import surgery
from linearize.config.schema import CalibrateConfig, LoraConfig, Recipe, StageConfig
from linearize.distill import trainable
from linearize.export import rounding
from linearize.models import routers

FAMILIES = ("mixtral", "qwen3_moe")


@pytest.fixture(autouse=True)
def as_many_cards(request: pytest.FixtureRequest) -> None:
    enough_cards(request)


@pytest.fixture
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with weights of each expert, whose config asks for a loss of the routers'."""
    made = tiny.model(request.param, vocab_size=259, num_hidden_layers=2, output_router_logits=True)
    made.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def few(recipe: Recipe, *stages: str) -> Recipe:
    chosen = {name: recipe.stages[name] for name in stages}
    return replace(recipe, stages=chosen, calibrate=CalibrateConfig(tokens=0))


@pytest.mark.parametrize(
    "teacher, stages",
    [("qwen3_moe", ("transfer", "recover", "whole")), ("mixtral", ("recover",))],
    indirect=["teacher"],
    ids=FAMILIES[::-1],
)
def test_in_shards(teacher: Path, stages: tuple[str, ...], every_stage: Recipe, tmp_path: Path) -> None:
    """Losses and weights of one process; the export loads, and holds the teacher's experts where they did not train."""
    recipe, alone, out = few(every_stage, *stages), tmp_path / "one", tmp_path / "run"
    ended = start(1, run, str(teacher), recipe, alone, folder=tmp_path / "a")
    assert ended.codes == [0], ended.said
    sharded = replace(recipe, run=replace(recipe.run, shard="full"))
    ended = start(2, whole, str(teacher), sharded, out, folder=tmp_path / "b")
    assert ended.codes == [0, 0], ended.said
    assert_equal(out, alone)
    made, before = linearize.load(out / "checkpoint"), AutoModelForCausalLM.from_pretrained(teacher)
    assert len(surgery.converted(made)) == 2
    kept = {name: tensor for name, tensor in before.state_dict().items() if ".mlp." in name}
    assert len(kept) == 6
    found = made.state_dict()
    same = [torch.equal(found[name], tensor) for name, tensor in kept.items()]
    assert all(same) if "whole" not in stages else not any(same)
    ids = tiny.tokens(1, 24)
    text = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    again = made(input_ids=text[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(again, text[:, ids.shape[1] :])


@pytest.mark.parametrize("teacher", ["mixtral"], indirect=True)
def test_what_nobody_can_write_is_refused_first(teacher: Path, every_stage: Recipe, tmp_path: Path) -> None:
    recipe = few(every_stage, "transfer")
    recipe = replace(recipe, run=replace(recipe.run, shard="full"))
    ended = start(2, shard_jobs.written_together, str(teacher), recipe, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2, 2], ended.said
    once(ended, "holds weights that several tensors of the model make together")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains(family: str) -> None:
    """Mixers, adapters on projections of the attention, or all: experts and routers in the last alone."""
    model: Any = surgery.convert(tiny.model(family), tiny.LOLCATS)
    for stage in (StageConfig(train=["mixers"]), StageConfig(train=["lora"], lora=LoraConfig(rank=2))):
        model = trainable.prepare(model, stage)
        assert trainable.trained(model) and not [n for n in trainable.trained(model) if ".mlp." in n]
    names = trainable.trained(trainable.prepare(model, StageConfig(train=["all"])))
    assert [name for name in names if name.endswith("mlp.experts.gate_up_proj")]
    assert [name for name in names if name.endswith("mlp.gate.weight")]
    names = trainable.trained(trainable.prepare(model, StageConfig(train=["all"], freeze=["mlp"])))
    assert not [name for name in names if ".mlp." in name]


def test_a_router_whose_weights_stand_in_a_layer_of_its_own() -> None:
    """LongCat's, in which `linearize run` ended with a StopIteration."""
    sizes = {"hidden_size": 32, "n_routed_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2}
    config: Any = LongcatFlashConfig(**sizes, zero_expert_num=2)
    router = LongcatFlashTopkRouter(config).to(torch.bfloat16)
    weight, hidden = router.classifier.weight.detach().clone(), torch.randn(512, 32).bfloat16()
    routers.widen(router)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(hidden)[0]
    assert router.classifier.weight.dtype == logits.dtype == torch.float32
    exact = torch.nn.functional.linear(hidden.double(), weight.double())
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_family_has_in_float32_leaves_so(dtype: torch.dtype, tmp_path: Path) -> None:
    """DeepSeek-V3's router: rounded, its weights and correction send tokens to other experts than the teacher's."""
    model = surgery.convert(odd.model("deepseek_v3"), tiny.LOLCATS)
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(0.1 * torch.rand(4))
    wide = {
        "weight": gate.weight.detach().clone(),
        "e_score_correction_bias": gate.e_score_correction_bias.clone(),
    }
    linearize.save(rounding.in_dtype(model, dtype), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    own = loaded.model.layers[1].mlp.gate.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in wide.items())
    found, wanted = loaded.state_dict(), model.state_dict()
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in wanted.items()}
    assert loaded.dtype == loaded.lm_head.weight.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_in_float32(family: str) -> None:
    """Under bfloat16 weights and passes tokens go where float32 logits send them; a copy of the model's own too."""
    model: Any = tiny.model(family).to(torch.bfloat16)
    weight, hidden = model.model.layers[0].mlp.gate.weight.detach(), torch.randn(512, 32).bfloat16()
    exact = torch.nn.functional.linear(hidden.double(), weight.double())

    def logits(of: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return of.model.layers[0].mlp.gate(hidden)[0]

    before = logits(model)
    assert before.dtype == torch.bfloat16 and (before.double() - exact).abs().max() > 1e-3
    routers.widen(model)
    routers.widen(model)
    copied = tiny.model(family, seed=1).to(torch.bfloat16)
    routers.widen(copied)
    copied.load_state_dict(model.state_dict())
    for one in (model, copied):
        assert logits(one).dtype == torch.float32
        torch.testing.assert_close(logits(one).double(), exact, rtol=1e-5, atol=1e-5)
    ids = tiny.tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids).logits.float().square().mean()
        loss.backward()
    assert loss.isfinite() and model.model.layers[0].mlp.gate.weight.grad.dtype == torch.float32
    narrow = model.to(torch.bfloat16)  # as an export has it
    assert narrow(input_ids=ids).logits.isfinite().all()
