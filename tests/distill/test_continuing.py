"""What --resume accepts beside the very same recipe and MODEL, and that the result is the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import tiny_llama
from interrupted import at_step, press_ctrl_c
from safetensors.torch import load_file

from linearize import config, distill
from linearize.config.schema import Recipe, StageConfig
from linearize.data import store
from linearize.distill.callbacks import RunStopped
from linearize.distill.continuing import changes
from linearize.errors import CheckpointError, ModelNotFoundError, RunFolderError


@pytest.fixture
def plain(make_recipe: Callable[..., Recipe]) -> Recipe:
    """Two stages of four sequences a step in which nothing is drawn or divided for each micro-batch."""
    return plainly(make_recipe)


def plainly(make: Callable[..., Recipe]) -> Recipe:
    recipe = make(batch_size=4, tokens=6 * 4 * 64)
    recipe.stages["transfer"].objective = {"attention_output": 1.0}
    recipe.stages["recover"].lora.dropout = 0.0
    recipe.eval.ablations = False
    return recipe


@pytest.fixture(scope="module")
def one_stage(module_recipe: Callable[..., Recipe]) -> Recipe:
    recipe = plainly(module_recipe)
    recipe.stages.pop("recover")
    recipe.stages["transfer"].save_every = 2
    return recipe


@pytest.fixture(scope="module")
def whole(teacher_folder: Path, one_stage: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "cache_dir", lambda: folder / "cache")
        distill.run(str(teacher_folder), one_stage, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def cut(teacher_folder: Path, one_stage: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its run stopped at its fifth step of six, behind checkpoints of the second and the fourth."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(distill.RunStopped):
        patch.setattr(store, "cache_dir", lambda: folder / "cache")
        at_step(patch, "transfer", 5, press_ctrl_c)
        distill.run(str(teacher_folder), one_stage, folder / "run")
    return folder / "run"


@pytest.fixture
def stopped(cut: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(cut, tmp_path / "run")


def stop_at(
    stage: str, monkeypatch: pytest.MonkeyPatch, model: Path | str, recipe: Recipe, out: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(distill.RunStopped):
        at_step(patch, stage, 2, press_ctrl_c)
        distill.run(str(model), recipe, out, resume=True)


def finals(out: Path) -> dict[str, torch.Tensor]:
    files = sorted(out.glob("stage-*/final.safetensors"))
    assert len(files) == 2
    return {f"{path.parent.name} {name}": value for path in files for name, value in load_file(path).items()}


def test_what_computes_the_same_is_accepted_and_is_the_same(
    teacher_folder: Path,
    plain: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    distill.run(str(teacher_folder), plain, tmp_path / "whole")
    out, other = tmp_path / "run", copy.deepcopy(plain)
    stop_at("transfer", monkeypatch, teacher_folder, plain, out)
    other.stages["transfer"].micro_batch = 2
    other.stages["recover"].micro_batch = 1
    other.stages["recover"].gradient_checkpointing = True
    other.stages["recover"].save_every = 2
    other.eval.batch_size, other.run.workers, other.run.device = 1, 1, "auto"
    if torch.cuda.is_available():
        other.run.device = "cpu"
    with caplog.at_level("INFO", "linearize"):
        stop_at("recover", monkeypatch, teacher_folder, other, out)
    assert "going on with eval.batch_size: auto -> 1, " in caplog.text
    assert "stages.transfer.micro_batch: auto -> 2" in caplog.text and "stays the same" in caplog.text
    distill.run(str(teacher_folder), other, out, resume=True)
    expected, found = finals(tmp_path / "whole"), finals(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam makes steps as long of a small gradient, whose sum in another order rounds otherwise
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=5e-6, msg=name)
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (tmp_path / "whole", out)]
    for one, two in zip(*rows, strict=True):
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
    assert config.compose(out / "recipe.yaml").stages["recover"].micro_batch == 1
    first, second = json.loads((out / "environment.json").read_text())["resumed"]
    assert "stages.recover.micro_batch: auto -> 1" in first["changed"] and "changed" not in second


def mapping(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (
            "stages.transfer.batch_size",
            2,
            "stages.transfer.batch_size: 4 -> 2 (a step's sequences must stay; with less memory: stages.transfer.micro",
        ),
        ("stages.transfer.lr", 0.5, "stages.transfer.lr: 0.01 -> 0.5"),
        ("stages.transfer.log_every", 5, "stages.transfer.log_every: 1 -> 5"),
        ("stages.recover.lora.rank", 3, "stages.recover.lora.rank: 2 -> 3"),
        ("run.seed", 1, "run.seed: 0 -> 1"),
        ("run.precision", "bf16", "run.precision: auto -> bf16"),
        ("run.weights", "bfloat16", "run.weights: auto -> bfloat16"),
        ("eval.length", 32, "eval.length: 64 -> 32"),
        ("data.length", 32, "data.length: 64 -> 32"),
        ("layers", [0], "layers: all -> [0]"),
    ],
)
def test_what_changes_the_result_is_refused(plain: Recipe, path: str, value: object, line: str) -> None:
    before, after = mapping(plain), mapping(plain)
    inner, *keys = after, *path.split(".")
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    found = changes(before, after)
    assert [refused[: len(line)] for refused in found.refused] == [line] and not found.accepted


def test_a_stage_that_comes_or_goes_is_refused(plain: Recipe) -> None:
    before, after = mapping(plain), mapping(plain)
    after["stages"]["more"] = mapping(Recipe(stages={"more": StageConfig()}))["stages"]["more"]
    assert changes(before, after).refused and changes(after, before).refused
    assert not changes(before, after).accepted


def test_what_is_made_for_each_micro_batch_is_named(plain: Recipe) -> None:
    """The objectives' means are held equal one by one in test_stage."""
    plain.stages["transfer"].window_dropout, plain.stages["recover"].lora.dropout = 0.5, 0.1
    plain.stages["transfer"].objective = {"attention_output_relative": 1.0}
    before, after = mapping(plain), mapping(plain)
    for stage in after["stages"].values():
        stage["micro_batch"] = 2
    found = changes(before, after)
    assert not found.refused
    assert [" ".join(note.split()[:2]) for note in found.notes] == [
        "stages.transfer: window_dropout",
        "stages.transfer: attention_output_relative",
        "stages.recover: lora.dropout",
    ]


# MODEL


def test_another_model_under_the_same_path(
    teacher_folder: Path, plain: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(teacher_folder, model)
    stop_at("transfer", monkeypatch, model, plain, out)
    tiny_llama(seed=1).save_pretrained(model)
    with pytest.raises(RunFolderError, match=r"model: \S+ -> \S+ \(differs in weights\)"):
        distill.run(str(model), plain, out, resume=True)
    shutil.rmtree(model)
    shutil.copytree(teacher_folder, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    with pytest.raises(RunFolderError, match=r"\(differs in config\)"):
        distill.run(str(model), plain, out, resume=True)
    shutil.rmtree(model)
    with pytest.raises(ModelNotFoundError):
        distill.run(str(model), plain, out, resume=True)


@pytest.mark.parametrize("spelling", ["slash", "relative", "link", "copy"])
def test_the_same_model_by_another_spelling(
    spelling: str, teacher_folder: Path, plain: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.stages.pop("recover")
    out = tmp_path / "run"
    stop_at("transfer", monkeypatch, teacher_folder, plain, out)
    monkeypatch.chdir(tmp_path)
    if spelling == "link":
        (tmp_path / "link").symlink_to(teacher_folder)
    shutil.copytree(teacher_folder, tmp_path / "copy")
    name = {"slash": f"{teacher_folder}/", "relative": os.path.relpath(teacher_folder)}.get(
        spelling, spelling
    )
    distill.run(name, plain, out, resume=True)
    environment = json.loads((out / "environment.json").read_text())
    assert environment["model"] == str(teacher_folder) and environment["resumed"][0]["model"] == name


def test_a_folder_without_a_fingerprint_goes_on_with_a_notice(
    teacher_folder: Path,
    plain: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain.stages.pop("recover")
    out = tmp_path / "run"
    stop_at("transfer", monkeypatch, teacher_folder, plain, out)
    environment = json.loads((out / "environment.json").read_text())
    assert environment.pop("fingerprint").keys() == {"config", "weights", "tokenizer"}
    (out / "environment.json").write_text(json.dumps(environment))
    shutil.copytree(teacher_folder, tmp_path / "copy")
    with pytest.raises(RunFolderError, match=r"model: \S+ -> \S+copy"):
        distill.run(str(tmp_path / "copy"), plain, out, resume=True)
    with monkeypatch.context() as patch, pytest.raises(distill.RunStopped):
        at_step(patch, "transfer", 4, press_ctrl_c)
        distill.run(f"{teacher_folder}/", plain, out, resume=True)
    assert "no fingerprint" in caplog.text
    assert "fingerprint" in json.loads((out / "environment.json").read_text())


# Damage


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", b"[]", r"results\.json: holds a list.*Delete results\.json and go on with --resume"),
        (
            "results.json",
            b'{"rows": [{"name": "teacher", "perplexity": {"held-out": "x"}}]}',
            r"its rows are no results\. Delete",
        ),
        (
            "results.json",
            b'{"rows": [{"name": "teacher", "perplexity": {}, "tasks": {"piqa": {"acc": null}}}]}',
            r"its rows are no results\. Delete",
        ),
        ("results.json", b'{"rows": "x"}', r"results\.json: its rows are no results\. Delete"),
        (
            "results.json",
            b'{"rows": [{"name": "teacher", "perplexity": 3}]}',
            r"its rows are no results\. Delete",
        ),
        ("results.json", b"\xff", r"results\.json: cannot be read.*Delete"),
        ("environment.json", b"[1]", r"environment\.json: holds a list.*Delete environment\.json and go on"),
        ("environment.json", b"{", r"environment\.json: cannot be read.*Delete environment\.json"),
        ("recipe.yaml", b"{[", r"recipe\.yaml: cannot be read.*Write it again.*linearize recipes show"),
        ("recipe.yaml", b"3", r"recipe\.yaml: holds no recipe.*Write it again"),
        ("recipe.yaml", b"\xff", r"recipe\.yaml: cannot be read"),
    ],
)
def test_damaged_files_name_their_remedy(
    name: str,
    content: bytes,
    message: str,
    teacher_folder: Path,
    one_stage: Recipe,
    stopped: Path,
) -> None:
    (stopped / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        distill.run(str(teacher_folder), one_stage, stopped, resume=True)
    if name == "recipe.yaml":
        (stopped / name).write_text(config.to_yaml(one_stage))
    else:
        (stopped / name).unlink()
    distill.run(str(teacher_folder), one_stage, stopped, resume=True)


def test_damaged_lines_of_metrics_are_dropped(
    teacher_folder: Path, one_stage: Recipe, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = stopped / "metrics.jsonl"
    metrics.write_bytes(
        b'3\n{"stage": "transfer", "step": null}\n\xff\xfe\n['
        + b"[" * 9999
        + b"\n"
        + metrics.read_bytes()
        + b'{"sta'
    )
    distill.run(str(teacher_folder), one_stage, stopped, resume=True)
    assert "metrics.jsonl: 4 damaged lines are dropped" in caplog.text
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "file", ["trained.safetensors", "optimizer.safetensors", "state.json", "trainer_state.json"]
)
@pytest.mark.parametrize("checksums", [True, False])
def test_the_checkpoint_before_a_damaged_one(
    file: str,
    checksums: bool,
    teacher_folder: Path,
    one_stage: Recipe,
    whole: Path,
    stopped: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The newest is damaged at its full size; from the one before it the result is the same, bit for bit."""
    folder = stopped / "stage-1-transfer" / "checkpoint-5"
    size = (folder / file).stat().st_size
    content = b"\x7f" * size if not checksums else (folder / file).read_bytes()[:-1] + b"\x7f"
    (folder / file).write_bytes(content)
    if not checksums:  # as earlier versions wrote it
        marker = json.loads((folder / "complete.json").read_text())
        sizes = {name: entry["size"] for name, entry in marker["files"].items()}
        (folder / "complete.json").write_text(json.dumps({"files": sizes}))
    distill.run(str(teacher_folder), one_stage, stopped, resume=True)
    assert f"checkpoint-5: {file} is damaged; going on from before it" in caplog.text
    name = "stage-1-transfer/final.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_a_stage_whose_result_changed_is_not_taken(
    teacher_folder: Path, plain: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stop_at("recover", monkeypatch, teacher_folder, plain, out)
    path = out / "stage-1-transfer" / "final.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        CheckpointError,
        match=r"is not what was written.*Delete \S+stage-1-transfer, then give the command again",
    ):
        distill.run(str(teacher_folder), plain, out, resume=True)
    shutil.rmtree(path.parent)
    distill.run(str(teacher_folder), plain, out, resume=True)


def test_other_packages_than_the_run_began_with_are_told(
    teacher_folder: Path, plain: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        at_step(patch, "transfer", 2, press_ctrl_c)
        distill.run(str(teacher_folder), plain, out)
    environment = json.loads((out / "environment.json").read_text())
    here = environment["packages"]["torch"]
    environment["packages"]["torch"] = "1.0"
    (out / "environment.json").write_text(json.dumps(environment))
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        at_step(patch, "transfer", 3, press_ctrl_c)
        distill.run(str(teacher_folder), plain, out, resume=True)
    assert caplog.text.count("going on with other packages") == 1 and f"(torch 1.0 -> {here})" in caplog.text
