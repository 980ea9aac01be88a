"""Weights that do not train in bfloat16, masters in float32, one rounding on the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_llama import MIXER, byte_tokenizer, tiny_llama
from safetensors import safe_open
from torch import Tensor

import linearize
from linearize import distill, models, surgery
from linearize.config.schema import LoraConfig, Recipe, RunConfig, StageConfig
from linearize.distill.device import resolve_weights
from linearize.distill.stages import _Checkpointing
from linearize.distill.trainable import prepare, trained
from linearize.errors import LinearizeError
from linearize.export.rounding import in_dtype, merged

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    tiny_llama().to(HALF).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_weights(RunConfig(), CUDA) == HALF
    assert resolve_weights(RunConfig(), CPU) == torch.float32
    assert resolve_weights(RunConfig(precision="fp32"), CUDA) == torch.float32
    assert resolve_weights(RunConfig(precision="bf16"), CPU) == torch.float32
    assert resolve_weights(RunConfig(precision="bf16", weights="bfloat16"), CPU) == HALF
    assert resolve_weights(RunConfig(weights="float32"), CUDA) == torch.float32
    with pytest.raises(LinearizeError, match=r"set run\.precision=bf16"):
        resolve_weights(RunConfig(weights="bfloat16"), CPU)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert resolve_weights(RunConfig(), CUDA) == torch.float32


def stored(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


@pytest.mark.job
def test_a_run_of_both_widths(half_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Losses and perplexities within 1 %; the export is as wide as the teacher, and loads as the model that ran."""
    found = {}
    for weights in ("float32", "bfloat16"):
        recipe = make_recipe(tokens=6 * 2 * 64)
        recipe.run.precision, recipe.run.weights = "bf16", weights
        recipe.stages["all"] = StageConfig(
            objective={"logits_kl": 1.0}, train=["all"], tokens=4 * 2 * 64, batch_size=2, lr=1e-4, log_every=1
        )
        recipe.eval.ablations = False
        summary = distill.run(str(half_folder), recipe, tmp_path / weights)
        lines = (tmp_path / weights / "metrics.jsonl").read_text().splitlines()
        found[weights] = [json.loads(line)["loss"] for line in lines]
        found[weights] += [row["perplexity"]["held-out"] for row in summary.rows]
        tensors = stored(summary.checkpoint)
        assert {x.dtype for name, x in tensors.items() if ".mixer." not in name} == {HALF}
        assert {x.dtype for name, x in tensors.items() if ".mixer." in name} == {torch.float32}
        assert linearize.load(summary.checkpoint).dtype == HALF
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=1e-2)
    assert found["bfloat16"] != found["float32"]
    facts = json.loads((tmp_path / "bfloat16" / "environment.json").read_text())
    assert facts["precision"] == "bf16 autocast, bfloat16 weights, float32 masters"


def test_the_exports_width_is_asked_for(half_folder: Path, teacher_folder: Path) -> None:
    assert models.stored_dtype(str(half_folder)) == HALF
    assert models.stored_dtype(str(teacher_folder)) == torch.float32


@pytest.mark.parametrize("train", ["mixers", "lora", "all"])
def test_what_trains_has_float32_masters_and_the_rest_does_not(train: str) -> None:
    model = surgery.convert(tiny_llama().to(HALF), MIXER, "all")
    lora = LoraConfig(rank=2) if train == "lora" else None
    model = prepare(model, StageConfig(train=[train], lora=lora))
    names = trained(model)
    assert names and {p.dtype for p in names.values()} == {torch.float32}
    rest = {p.dtype for n, p in model.named_parameters() if n not in names and ".mixer." not in n}
    assert rest == (set() if train == "all" else {HALF})


def test_converting_holds_no_weight_twice() -> None:
    teacher = tiny_llama().to(HALF)
    places = {name: p.data_ptr() for name, p in teacher.named_parameters()}
    model = surgery.convert(teacher, MIXER, "all")
    model = prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2)))
    after = {p.data_ptr(): p.dtype for p in model.parameters()}
    assert {after.get(place) for place in places.values()} == {HALF}
    assert len(
        {p.data_ptr() for n, p in model.named_parameters() if ".mixer." not in n and "lora" not in n}
    ) == len(set(places.values()))


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_merging_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = surgery.convert(tiny_llama().to(HALF), MIXER, "all")
    model = prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2, alpha=4)))
    for parameter in trained(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    exact = layer.base_layer.weight.double() + 2.0 * (b.double() @ a.double())
    plain = in_dtype(merged(model, dtype), dtype)
    found = plain.model.layers[1].self_attn.q_proj.weight
    assert found.dtype == dtype
    if dtype == HALF:
        assert (found == exact.to(HALF)).float().mean() > 0.999  # float32 may lie on the other side of a tie
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 if dtype == HALF else 1e-6, atol=1e-7)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]


def test_rounding_spares_mixers_and_tables() -> None:
    model = surgery.convert(tiny_llama(), MIXER, "all")
    table = model.model.rotary_emb.inv_freq.clone()
    in_dtype(model, HALF)
    assert torch.equal(model.model.rotary_emb.inv_freq, table)
    assert all((p.dtype == torch.float32) == (".mixer." in n) for n, p in model.named_parameters())
    assert model.config.dtype == HALF and model.dtype == HALF


def test_checkpointing_in_both_widths() -> None:
    """The same gradient with activations computed again, under autocast over bfloat16 weights."""
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = surgery.convert(tiny_llama().to(HALF), MIXER, "all")
        model = prepare(model, StageConfig(train=["mixers"])).train()
        ids = torch.arange(64)[None] % 200
        if on:
            _Checkpointing(model).__enter__()
        with torch.autocast("cpu", dtype=HALF, cache_enabled=False):
            model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
        gradients.append([p.grad for p in trained(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
