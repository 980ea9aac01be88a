"""The whole job on a tiny model: what the run folder holds, and that the export is what was measured."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_llama import MIXER, tiny_llama
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize import config, distill, surgery
from linearize.config.schema import Recipe, StageConfig
from linearize.distill import exporting, stages
from linearize.distill.finetune import predict_teacher
from linearize.distill.trainable import prepare
from linearize.eval.perplexity import perplexity

ROWS = [
    "teacher",
    "swapped, untrained",
    "after transfer",
    "after recover",
    "linear branch off",
    "window off",
    "mixers untrained",
]


@pytest.fixture(scope="module")
def unrendered() -> None:
    """Here the pictures are rendered."""


def test_two_stages_end_to_end(
    teacher_folder: Path,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, recipe = tmp_path / "run", make_recipe()
    recipe.eval.texts = {"again": recipe.data.source}
    summary = distill.run(str(teacher_folder), recipe, out, recipe_name="tiny")

    names = {path.name for path in out.iterdir()}
    assert {
        "recipe.yaml",
        "environment.json",
        "plan.json",
        "metrics.jsonl",
        "results.json",
        "stage-1-transfer",
        "stage-2-recover",
        "checkpoint",
        "report.md",
        "done.json",
    } <= names
    assert not [name for name in names if name.startswith(".")]
    assert list(names & {"loss.png", "layer_loss.png"})
    for stage in ("stage-1-transfer", "stage-2-recover"):
        assert {path.name for path in (out / stage).iterdir()} == {"final.safetensors", "done.json"}

    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ROWS
    assert all(set(row["perplexity"]) == {"held-out", "again"} for row in results["rows"])
    assert summary.rows == results["rows"]
    screen = Console(file=io.StringIO(), width=80)
    screen.print(summary.table())
    shown = screen.file.getvalue()
    assert all(name in shown for name in ROWS) and "again" in shown
    assert summary.checkpoint == out / "checkpoint"

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ("transfer", "recover") for step in range(1, 11)
    ]
    assert all(line["tokens"] == line["step"] * 2 * 64 for line in lines)
    transfer = [line for line in lines if line["stage"] == "transfer"]
    assert all(len(line["layers"]) == 2 for line in transfer)
    assert transfer[-1]["loss"] < transfer[0]["loss"]
    assert "layers" not in lines[-1]
    # Warm-up is one step of ten here; the cosine ends at a tenth of the peak.
    assert transfer[-1]["lr"] == pytest.approx(1e-3)

    environment = json.loads((out / "environment.json").read_text())
    assert (environment["model"], environment["recipe"]) == (str(teacher_folder), "tiny")
    assert config.compose(out / "recipe.yaml").stages == recipe.stages
    assert len(json.loads((out / "plan.json").read_text())["rows"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""  # Trainer prints nothing, and progress goes to standard error
    assert "stage 1/2 transfer 100%" in captured.err

    # The export measures what the run measured, under either way of loading.
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    text = Path(recipe.data.validation).read_text()
    for model in (
        linearize.load(out / "checkpoint"),
        AutoModelForCausalLM.from_pretrained(out / "checkpoint"),
    ):
        value = perplexity(model, tokenizer, text, window=64, max_windows=4).value
        row = next(row for row in results["rows"] if row["name"] == "after recover")
        assert value == pytest.approx(row["perplexity"]["held-out"], rel=1e-5)


def test_reloaded_export_gives_equal_logits(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without adapters nothing is merged, so the logits are equal bit for bit."""
    recipe = make_recipe()
    del recipe.stages["recover"]
    recipe.eval.ablations = False
    exported = []
    monkeypatch.setattr(
        exporting.export,
        "save",
        lambda model, *args, _save=exporting.export.save, **kw: (
            exported.append(model) or _save(model, *args, **kw)
        ),
    )
    summary = distill.run(str(teacher_folder), recipe, tmp_path / "run")
    reloaded = linearize.load(summary.checkpoint)
    ids = torch.arange(90)[None] % 256
    with torch.no_grad():
        assert torch.equal(exported[0](ids).logits, reloaded(ids).logits)
    assert exported[0].config.use_cache and reloaded.config.use_cache  # Trainer switches it off


def test_adapters_kept_apart(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from peft import PeftModel

    recipe = make_recipe()
    recipe.stages["recover"].lora.merge = False
    recipe.eval.ablations = False
    summary = distill.run(str(teacher_folder), recipe, tmp_path / "run")
    merged = make_recipe()
    merged.eval.ablations = False
    other = distill.run(str(teacher_folder), merged, tmp_path / "merged")
    apart = PeftModel.from_pretrained(
        linearize.load(summary.checkpoint), summary.checkpoint / "adapter"
    ).eval()
    ids = torch.arange(90)[None] % 256
    with torch.no_grad():
        torch.testing.assert_close(apart(ids).logits, linearize.load(other.checkpoint)(ids).logits)
        assert not torch.allclose(apart(ids).logits, linearize.load(summary.checkpoint)(ids).logits)


def test_full_finetuning_compares_with_the_original(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the base weights train, the model in teacher mode is no teacher any more: a copy takes its place."""
    recipe = make_recipe(tokens=3 * 2 * 64)
    recipe.stages["full"] = StageConfig(
        objective={"logits_kl": 1.0},
        tokens=3 * 2 * 64,
        batch_size=2,
        lr=1e-3,
        train=["all"],
        gradient_checkpointing=True,
    )
    del recipe.stages["recover"]
    recipe.eval.ablations = False
    teachers = []
    original = stages.FinetuneTrainer.__init__

    def init(self, model, *, teacher=None, **settings) -> None:
        teachers.append(teacher)
        original(self, model, teacher=teacher, **settings)

    monkeypatch.setattr(stages.FinetuneTrainer, "__init__", init)
    summary = distill.run(str(teacher_folder), recipe, tmp_path / "run")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(teachers[0](ids).logits, tiny_llama()(ids).logits)
    assert summary.checkpoint.is_dir()


def test_teacher_of_an_adapted_model_is_the_original() -> None:
    batch = {"input_ids": torch.arange(60)[None], "labels": torch.arange(60)[None]}
    model = surgery.convert(tiny_llama(), MIXER, "all")
    from linearize.config.schema import LoraConfig

    model = prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2)))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        assert torch.equal(predict_teacher(model, batch), tiny_llama()(batch["input_ids"]).logits)
    # A stage that freezes the adapters finds them frozen after the teacher has spoken.
    model = prepare(model, StageConfig(train=["mixers"]))
    predict_teacher(model, batch)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if ".mixer." in name
    }


def test_recipe_without_stages_is_a_plain_conversion(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe()
    recipe.stages = {}
    recipe.mixer = {"window": {"name": "full"}}
    recipe.eval.ablations = False
    summary = distill.run(str(teacher_folder), recipe, tmp_path / "run")
    teacher, swapped = (row["perplexity"]["held-out"] for row in summary.rows)
    assert swapped == pytest.approx(teacher, rel=1e-5)
