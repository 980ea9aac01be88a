"""A run cut off and resumed gives what an uninterrupted run gives, bit for bit, in both kinds of stages."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interrupted import Crash, at_step, crash, finals, losses, press_ctrl_c
from safetensors.torch import load_file

from linearize import distill, storing
from linearize.config.schema import Recipe, StageConfig, StageDataConfig
from linearize.errors import CheckpointError


def accumulating(make: Callable[..., Recipe]) -> Recipe:
    """Accumulation, lines that average two steps, and checkpoints that fall between lines."""
    recipe = make(batch_size=4, micro_batch=2, tokens=8 * 2 * 2 * 64, log_every=2, save_every=3)
    recipe.eval.ablations = False
    return recipe


@pytest.fixture
def small(make_recipe: Callable[..., Recipe]) -> Recipe:
    return accumulating(make_recipe)


@pytest.fixture(scope="module")
def reference(
    teacher_folder: Path, module_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of it that nobody interrupts."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reference") / "run"
    distill.run(str(teacher_folder), accumulating(module_recipe), out)
    return out


def assert_equal(out: Path, reference: Path) -> None:
    assert losses(out) == losses(reference)
    expected, found = finals(reference), finals(out)
    assert list(found) == list(expected)
    assert [name.split("-")[0:2] for name in found] == [["stage", "1"], ["stage", "2"]]
    for stage, tensors in expected.items():
        assert tensors.keys() == found[stage].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, found[stage][name]), (stage, name)
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (out, reference)]
    assert rows[0] == rows[1]


def test_crash_in_each_stage(
    teacher_folder: Path, small: Recipe, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is of step 3; steps 4 and 5 are lost and trained again."""
    out = tmp_path / "run"
    for stage in ("transfer", "recover"):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            at_step(patch, stage, 5, crash)
            distill.run(str(teacher_folder), small, out, resume=True)
        assert storing.latest(next(out.glob(f"stage-*-{stage}"))).name == "checkpoint-3"
        torch.manual_seed(123)  # a new process would not share the random state either
    measured = json.loads((out / "results.json").read_text())["rows"]
    assert [row["name"] for row in measured] == ["teacher", "swapped, untrained", "after transfer"]
    summary = distill.run(str(teacher_folder), small, out, resume=True)
    assert [row["name"] for row in summary.rows][-1] == "after recover"
    assert_equal(out, reference)


def test_crash_with_every_option(
    tied_folder: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Window dropout, text of a stage's own; then groups of parameters and untied embeddings."""
    common = {"batch_size": 4, "micro_batch": 2, "log_every": 2, "save_every": 3}
    small.stages = {
        "transfer": StageConfig(
            objective={"mixing_matrix": 1.0, "hidden_alignment": 1.0},
            tokens=8 * 4 * 32,
            window_dropout=0.5,
            data=StageDataConfig(length=32),
            **common,
        ),
        "recover": StageConfig(
            objective={"logits_kl": 1.0},
            tokens=8 * 4 * 64,
            lr=1e-3,
            lr_mixers=1e-2,
            train=["all"],
            freeze=["norms"],
            untie=True,
            **common,
        ),
    }
    distill.run(str(tied_folder), small, tmp_path / "whole")
    out = tmp_path / "run"
    for stage in small.stages:
        with monkeypatch.context() as patch, pytest.raises(Crash):
            at_step(patch, stage, 5, crash)
            distill.run(str(tied_folder), small, out, resume=True)
        torch.manual_seed(123)
    saved = load_file(out / "stage-2-recover" / "checkpoint-3" / "trained.safetensors")
    assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])
    distill.run(str(tied_folder), small, out, resume=True)
    assert_equal(out, tmp_path / "whole")
    assert "lm_head.weight" not in finals(out)["stage-2-recover"]


def test_ctrl_c_in_each_stage(
    teacher_folder: Path, small: Recipe, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step in hand is finished and saved, off the rhythm of save_every and log_every."""
    out = tmp_path / "run"
    for stage in ("transfer", "recover"):
        with monkeypatch.context() as patch, pytest.raises(distill.RunStopped) as stopped:
            at_step(patch, stage, 5, press_ctrl_c)
            distill.run(str(teacher_folder), small, out, resume=True)
        assert f"stage '{stage}' after step 5 of 8" in str(stopped.value)
        assert f"linearize run {teacher_folder} {out}/recipe.yaml --out {out} --resume" in str(stopped.value)
        assert storing.latest(next(out.glob(f"stage-*-{stage}"))).name == "checkpoint-5"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    distill.run(str(teacher_folder), small, out, resume=True)
    assert_equal(out, reference)


def test_ctrl_c_at_the_last_step_of_a_stage(
    teacher_folder: Path, small: Recipe, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(distill.RunStopped, match="after stage 'transfer'"):
        at_step(patch, "transfer", 8, press_ctrl_c)
        distill.run(str(teacher_folder), small, out)
    assert (out / "stage-1-transfer" / "done.json").is_file()
    distill.run(str(teacher_folder), small, out, resume=True)
    assert_equal(out, reference)


def test_partial_checkpoints_are_passed_over(
    teacher_folder: Path, small: Recipe, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a folder without its marker nor one with a truncated file is resumed from."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, "transfer", 7, crash)
        distill.run(str(teacher_folder), small, out)
    stage = out / "stage-1-transfer"
    assert [path.name for path in storing.checkpoints(stage)] == ["checkpoint-3", "checkpoint-6"]
    damaged = stage / "checkpoint-6" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    (stage / "checkpoint-7").mkdir()
    assert storing.latest(stage).name == "checkpoint-3"
    distill.run(str(teacher_folder), small, out, resume=True)
    assert_equal(out, reference)


@pytest.mark.parametrize("name", ["checkpoint-999999999999", "checkpoint-06", "checkpoint-4"])
def test_a_renamed_checkpoint_is_refused_by_name(
    name: str, teacher_folder: Path, small: Recipe, reference: Path, tmp_path: Path, monkeypatch
) -> None:
    """Taken for a later step it would end the stage, and pruning would delete the true ones for it."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, "transfer", 7, crash)
        distill.run(str(teacher_folder), small, out)
    stage = out / "stage-1-transfer"
    true = (stage / "checkpoint-6").rename(stage / name)
    with pytest.raises(CheckpointError, match=rf"{name}: holds step 6.* back the name checkpoint-6, or move"):
        distill.run(str(teacher_folder), small, out, resume=True)
    assert storing.damaged(true) is None and (stage / "checkpoint-3").is_dir()
    true.rename(stage / "checkpoint-6")
    distill.run(str(teacher_folder), small, out, resume=True)
    assert_equal(out, reference)


def test_several_passes_over_a_short_text(
    teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch
) -> None:
    """More budget than text: passes are reshuffled, and a resume in a later pass is exact."""
    text = Path(small.data.source)
    # 10 of the 32 sequences that the stage wants
    text.write_text(text.read_text()[: 64 * 10], encoding="utf-8")
    small.data.validation = str(text)
    distill.run(str(teacher_folder), small, tmp_path / "whole")
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, "transfer", 7, crash)
        distill.run(str(teacher_folder), small, out)
    distill.run(str(teacher_folder), small, out, resume=True)
    assert_equal(out, tmp_path / "whole")


def test_nothing_is_pickled(teacher_folder: Path, small: Recipe, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, "recover", 5, crash)
        distill.run(str(teacher_folder), small, out)
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml"}
    names = load_file(out / "stage-2-recover" / "checkpoint-3" / "trained.safetensors").keys()
    assert names and all(".lora_" in name for name in names)
