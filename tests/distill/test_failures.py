"""What goes wrong in a long job, and that nothing is lost by it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_llama import MIXER, tiny_llama
from interrupted import at_step, press_ctrl_c
from safetensors import SafetensorError

from linearize import config, distill, storing
from linearize.config.schema import LoraConfig, Recipe, StageConfig
from linearize.distill import trainable
from linearize.distill.stage import StageTrainer
from linearize.errors import (
    CheckpointError,
    DataError,
    LinearizeError,
    NonFiniteLossError,
    RecipeError,
    RunFolderError,
)


@pytest.fixture
def small(make_recipe: Callable[..., Recipe]) -> Recipe:
    recipe = make_recipe(save_every=2)
    recipe.eval.ablations = False
    return recipe


def poison(trainer: StageTrainer, fragment: str, value: float) -> None:
    """Damage one trained parameter."""
    name = next(name for name in trainer.parameters if fragment in name)
    trainer.parameters[name].data.fill_(value)


def damage_before_step(
    monkeypatch: pytest.MonkeyPatch, stage: str, step: int, fragment: str, value: float
) -> None:
    original = StageTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.stage_name == stage and self.state.global_step + 1 == step:
            poison(self, fragment, value)
        return original(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)


# NaN


def test_nan_in_transfer_names_the_layer(
    teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_before_step(monkeypatch, "transfer", 6, "layers.1.self_attn.mixer", float("nan"))
    with pytest.raises(NonFiniteLossError) as stopped:
        distill.run(str(teacher_folder), small, tmp_path / "run")
    text = str(stopped.value)
    assert "stage 'transfer', step 6: the loss of layer 1 is nan. The step was not applied" in text
    good = tmp_path / "run" / "stage-1-transfer" / "checkpoint-4"
    assert str(good) in text
    assert "stages.transfer.lr=0.001" in text
    assert storing.latest(good.parent) == good
    assert all(
        tensor.isfinite().all() for tensor in storing.read_tensors(good / "trained.safetensors").values()
    )
    monkeypatch.undo()
    distill.run(str(teacher_folder), small, tmp_path / "run", resume=True)  # the cause was passing


def test_nan_in_finetuning(
    teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_before_step(monkeypatch, "recover", 2, "layers.0.self_attn.q_proj", float("inf"))
    with pytest.raises(
        NonFiniteLossError, match=r"stage 'recover', step 2: the loss is nan.*none of this stage yet"
    ):
        distill.run(str(teacher_folder), small, tmp_path / "run")


def test_non_finite_gradient_of_a_finite_loss(
    teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StageTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = original(self, model, inputs, num_items_in_batch)
        next(iter(self.parameters.values())).grad[...] = float("inf")
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    with pytest.raises(
        NonFiniteLossError, match=r"step 1: the gradient of model\.layers\.0\.self_attn\.mixer\S+ is not"
    ):
        distill.run(str(teacher_folder), small, tmp_path / "run")


# The run folder


def test_existing_run_is_refused_without_resume(teacher_folder: Path, small: Recipe, tmp_path: Path) -> None:
    small.stages = {}
    out = tmp_path / "run"
    distill.run(str(teacher_folder), small, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(RunFolderError, match=r"has ended; its model is in .*checkpoint.*--out"):
            distill.run(str(teacher_folder), small, out, resume=resume)
    (out / "done.json").unlink()
    with pytest.raises(RunFolderError, match=r"holds a run already: go on with --resume, or .*--out"):
        distill.run(str(teacher_folder), small, out)
    small.run.seed = 5
    with pytest.raises(RunFolderError, match=r"(?s)another recipe or model.*run\.seed: 0 -> 5.*recipe\.yaml"):
        distill.run(str(teacher_folder), small, out, resume=True)
    small.run.seed = 0
    with pytest.raises(RunFolderError, match=r"model: .* -> other"):
        distill.run("other", small, out, resume=True)
    assert {path: path.read_bytes() for path in before if path.name != "done.json"} == {
        path: text for path, text in before.items() if path.name != "done.json"
    }


def test_foreign_folder_is_refused(teacher_folder: Path, small: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not empty and holds no run"):
        distill.run(str(teacher_folder), small, tmp_path / "mine")
    with pytest.raises(RunFolderError, match="is a file"):
        distill.run(str(teacher_folder), small, tmp_path / "mine" / "thesis.txt")


def test_mistakes_leave_no_folder(teacher_folder: Path, small: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(LinearizeError):
        distill.run(str(tmp_path / "no-such-model"), small, out)
    small.eval.texts = {"missing": str(tmp_path / "missing.txt")}
    with pytest.raises(DataError, match=r"missing\.txt"):
        distill.run(str(teacher_folder), small, out)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    small.eval.texts = {"short": str(short)}
    with pytest.raises(DataError, match=r"evaluation text 'short': .*shorter than one window of 64"):
        distill.run(str(teacher_folder), small, out)
    small.eval.texts = {}
    small.data.source = str(short)
    with pytest.raises(DataError):
        distill.run(str(teacher_folder), small, out)
    assert not out.exists()


def test_mistakes_are_told_together_before_any_weight_is_loaded(
    teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("linearize.models.load_teacher", loaded)
    out = tmp_path / "run"
    small.layers = [7]
    assert small.stages["recover"].lora is not None
    small.stages["recover"].lora.rank = 500
    small.eval.texts = {"missing": str(tmp_path / "missing.txt")}
    small.data.source = str(tmp_path / "gone.txt")
    with pytest.raises(RecipeError) as caught:
        distill.run(str(teacher_folder), small, out, recipe_name="mine")
    told = str(caught.value).splitlines()
    assert told[0] == f"mine on {teacher_folder}: 4 problems"
    parts = ["no attention layer 7", "lora.rank: 500", "missing.txt", "gone.txt"]
    for part in parts:
        assert sum(part in line for line in told) == 1, (part, told)
    # what cannot be had on this machine, and a teacher that is not there, too; then no text is read through
    monkeypatch.setattr("linearize.distill.texts.dataset", loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wrong in ({"device": "cuda"}, {"weights": "bfloat16"}):
        running = replace(small.run, teacher=str(tmp_path / "nobody"), **wrong)
        stage = replace(small.stages["recover"], objective={"logits_kl": 1.0})
        asked = replace(small, run=running, stages={**small.stages, "recover": stage})
        with pytest.raises(RecipeError) as caught:
            distill.run(str(teacher_folder), asked, out, recipe_name="mine")
        told = str(caught.value).splitlines()
        assert told[0] == f"mine on {teacher_folder}: 6 problems"
        for part in [*parts, f"run.{next(iter(wrong))}: ", "nobody': there is no"]:
            assert sum(part in line for line in told) == 1, (part, told)
    monkeypatch.undo()
    small.layers, small.stages["recover"].lora.rank, small.eval.texts = "all", 2, {}
    del small.stages["transfer"]
    with pytest.raises(DataError, match="gone"):  # one mistake is the error that it is
        distill.run(str(teacher_folder), small, out)
    assert not out.exists()


# A full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "rust"],
)
def test_full_disk_keeps_the_previous_checkpoint(
    error: Exception, teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    original = storing.save_file

    def save_file(tensors, path, *args):
        original(tensors, path, *args)
        if Path(path).parent.name == ".partial-checkpoint-4" and Path(path).name == "optimizer.safetensors":
            raise error

    monkeypatch.setattr(storing, "save_file", save_file)
    with pytest.raises(CheckpointError) as stopped:
        distill.run(str(teacher_folder), small, out)
    stage = out / "stage-1-transfer"
    assert f"{stage / 'checkpoint-4'}: the disk is full. The previous checkpoint is intact" in str(
        stopped.value
    )
    assert sorted(path.name for path in stage.iterdir()) == ["checkpoint-2"]
    monkeypatch.undo()
    distill.run(str(teacher_folder), small, out, resume=True)


def test_a_full_disk_at_a_single_file_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(folder: Path) -> None:
        storing.write_json(folder / "state.json", {})

    storing.write_folder(tmp_path / "checkpoint-1", fill)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(CheckpointError) as stopped:
            storing.write_folder(tmp_path / "checkpoint-2", fill)
    said = f"{tmp_path / 'checkpoint-2'}: the disk is full. The previous checkpoint is intact (checkpoint-1)"
    assert str(stopped.value).startswith(said)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("file", ["metrics.jsonl", "results.json", "final.safetensors"])
def test_full_disk_for_any_other_file(
    file: str, teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    replace, opened = os.replace, Path.open
    monkeypatch.setattr(os, "replace", lambda a, b: full() if Path(b).name == file else replace(a, b))
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *args, **kw: (
            full() if self.name == "metrics.jsonl" == file else opened(self, *args, **kw)
        ),
    )
    with pytest.raises(CheckpointError, match=rf"{file}: the disk is full"):
        distill.run(str(teacher_folder), small, tmp_path / "run")
    monkeypatch.undo()
    distill.run(str(teacher_folder), small, tmp_path / "run", resume=True)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk"
)
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        pytest.skip("no mounts here")
    try:

        def write(size: int) -> Callable[[Path], None]:
            return lambda folder: storing.write_tensors(folder / "t.safetensors", {"t": torch.zeros(size)})

        storing.write_folder(disk / "checkpoint-1", write(100))
        with pytest.raises(CheckpointError, match="the disk is full"):
            storing.write_folder(disk / "checkpoint-2", write(10**6))
        assert os.listdir(disk) == ["checkpoint-1"]
        assert storing.latest(disk).name == "checkpoint-1"
    finally:
        subprocess.run(["umount", disk], check=True)


# Ctrl-C


def test_second_ctrl_c_aborts_at_once(
    teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    at_step(monkeypatch, "transfer", 5, lambda: (press_ctrl_c(), press_ctrl_c()))
    with pytest.raises(distill.RunStopped, match=r"(?s)aborted.*linearize run .* --resume"):
        distill.run(str(teacher_folder), small, out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert storing.latest(out / "stage-1-transfer").name == "checkpoint-4"
    monkeypatch.undo()
    distill.run(str(teacher_folder), small, out, resume=True)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGINT, "press Ctrl-C again to abort"), (signal.SIGTERM, "send SIGTERM again to abort")],
)
def test_either_signal_saves_and_is_answered_in_its_own_words(
    number: int, words: str, teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch, capsys
) -> None:
    at_step(monkeypatch, "transfer", 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(distill.RunStopped, match="after step 5 of 10") as stopped:
        distill.run(str(teacher_folder), small, tmp_path / "run")
    said = capsys.readouterr().err
    assert f"stopping after this step; {words} at once" in said and said.count("again") == 1
    assert stopped.value.exit_code == 128 + number


# Stages and devices


def test_wrong_stages_are_refused() -> None:
    from linearize import surgery

    model = surgery.convert(tiny_llama(), MIXER, "all")
    with pytest.raises(RecipeError, match="did you mean 'mixers'"):
        trainable.prepare(model, StageConfig(train=["mixer"]))
    with pytest.raises(RecipeError, match="no lora section"):
        trainable.prepare(model, StageConfig(train=["lora"]))
    model = trainable.prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2)))
    with pytest.raises(RecipeError, match=r"rank 4.* differ from an earlier stage's 2"):
        trainable.prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=4)))
    with pytest.raises(RecipeError, match=r"targets: .'q'. are not an earlier stage's"):
        trainable.prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2, targets=["q"])))
    again = StageConfig(train=["lora"], lora=LoraConfig(rank=2, targets=["o", "v", "k", "q"]))
    assert trainable.prepare(model, again) is model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(teacher_folder: Path, small: Recipe, tmp_path: Path) -> None:
    small.run.device = "cuda"
    with pytest.raises(LinearizeError, match=r"run\.device=cpu"):
        distill.run(str(teacher_folder), small, tmp_path / "run")


def test_damaged_stage_result(teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    at_step(monkeypatch, "recover", 1, press_ctrl_c)
    with pytest.raises(distill.RunStopped):
        distill.run(str(teacher_folder), small, out)
    monkeypatch.undo()
    path = out / "stage-1-transfer" / "final.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"stage-1-transfer/final\.safetensors: cannot be read"):
        distill.run(str(teacher_folder), small, out, resume=True)


def test_recipe_of_the_folder_resumes_the_run(
    teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch
) -> None:
    """The command that RunStopped prints names it."""
    out = tmp_path / "run"
    at_step(monkeypatch, "transfer", 2, press_ctrl_c)
    with pytest.raises(distill.RunStopped):
        distill.run(str(teacher_folder), small, out, recipe_name="mine")
    monkeypatch.undo()
    distill.run(
        str(teacher_folder), config.compose(out / "recipe.yaml"), out, resume=True, recipe_name="recipe"
    )
    environment = json.loads((out / "environment.json").read_text())
    assert environment["recipe"] == "mine"
    assert len(environment["resumed"]) == 1
