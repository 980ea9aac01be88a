"""Several processes with a part of the weights each train what one trains with all of them."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import several_jobs as jobs
import shard_jobs
import torch
from byte_llama import byte_tokenizer
from interrupted import finals
from several import lines, run, start, whole
from several_recipes import assert_equal, enough_cards, once

import linearize
from linearize import data, storing
from linearize.config.schema import CalibrateConfig, Recipe, StageConfig
from linearize.cost import stages
from linearize.distill import placing
from linearize.errors import LinearizeError
from linearize.eval.perplexity import perplexity, windows
from linearize.export import load_adapter


@pytest.fixture(autouse=True)
def as_many_cards(request: pytest.FixtureRequest) -> None:
    enough_cards(request)


@pytest.fixture
def recipe(every_stage: Recipe) -> Recipe:
    return sharded(every_stage)


def sharded(recipe: Recipe, **stages: StageConfig) -> Recipe:
    """The recipe in shards, with its stages or others, which leave out the calibration."""
    if stages:
        recipe = replace(recipe, stages=stages, calibrate=CalibrateConfig(tokens=0))
    return replace(recipe, run=replace(recipe.run, shard="full"))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_kind_of_stage(
    size: int, teacher_folder: Path, recipe: Recipe, of_one_process: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ended = start(size, whole, str(teacher_folder), recipe, out, folder=tmp_path)
    assert ended.codes == [0] * size, ended.said
    assert_equal(out, of_one_process)
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (out, of_one_process)]
    assert [row["name"] for row in rows[0]] == [row["name"] for row in rows[1]]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)
    # what trains whole is one file, what is sharded one of each process
    pieces = [f"final-{number + 1}-of-{size}.safetensors" for number in range(size)]
    assert {path.name for path in (out / "stage-3-whole").iterdir()} == {"done.json", *pieces}
    assert {path.name for path in (out / "stage-2-recover").iterdir()} == {"done.json", "final.safetensors"}
    assert not list(out.glob(".partial*"))
    model = linearize.load(out / "checkpoint")
    texts = data.validation_documents(recipe.data, byte_tokenizer())
    cut = windows(byte_tokenizer(), texts, window=64, max_windows=2)
    assert perplexity(model, None, cut).value == pytest.approx(
        rows[0][-1]["perplexity"][data.HELD_OUT], rel=1e-4
    )


def test_parts_of_a_model(tmp_path: Path) -> None:
    """259 rows of a table, which no number of processes divides."""
    ended = start(2, shard_jobs.parts, tmp_path, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said


@pytest.mark.slow
def test_parts_of_a_model_over_four(tmp_path: Path) -> None:
    ended = start(4, shard_jobs.parts, tmp_path, folder=tmp_path)
    assert ended.codes == [0] * 4, ended.said


def test_stopped_and_resumed_by_one(
    teacher_folder: Path, recipe: Recipe, of_one_process: Path, tmp_path: Path
) -> None:
    """SIGTERM to one of two that have shards, then one process that has everything, to the end."""
    out, model = tmp_path / "run", str(teacher_folder)
    given = (model, recipe, out, signal.SIGTERM, 1, ("whole", 2), False)
    ended = start(2, jobs.signalled, *given, folder=tmp_path / "a")
    assert ended.codes == [143, 143], ended.said
    once(ended, "stopped in stage 'whole' after step 3 of 4")
    checkpoint = storing.latest(out / "stage-3-whole")
    assert checkpoint is not None and checkpoint.name == "checkpoint-3"
    assert (checkpoint / "optimizer-2-of-2.safetensors").is_file()
    ended = start(1, run, model, recipe, out, True, folder=tmp_path / "b")
    assert ended.codes == [0], ended.said
    assert_equal(out, of_one_process)


@pytest.mark.slow
def test_begun_by_one_and_resumed_by_several(
    teacher_folder: Path, every_stage: Recipe, recipe: Recipe, of_one_process: Path, tmp_path: Path
) -> None:
    """One process with everything, four with shards, and two with a copy each."""
    out, model = tmp_path / "run", str(teacher_folder)
    given = (model, every_stage, out, signal.SIGINT, 0, ("whole", 1), False)
    ended = start(1, jobs.signalled, *given, folder=tmp_path / "a")
    assert ended.codes == [130], ended.said
    given = (model, recipe, out, signal.SIGINT, 2, ("prefer", 1), True)
    ended = start(4, jobs.signalled, *given, folder=tmp_path / "b")
    assert ended.codes == [130] * 4, ended.said
    ended = start(2, run, model, every_stage, out, True, folder=tmp_path / "c")
    assert ended.codes == [0, 0], ended.said
    assert_equal(out, of_one_process)


def test_a_killed_process(teacher_folder: Path, every_stage: Recipe, tmp_path: Path) -> None:
    """The other one, which waits for its rows, says so in our words."""
    recipe = sharded(every_stage, whole=every_stage.stages["whole"])
    out, model = tmp_path / "run", str(teacher_folder)
    given = (model, recipe, out, signal.SIGKILL, 1, ("whole", 3), False)
    ended = start(2, jobs.signalled, *given, folder=tmp_path)
    assert ended.codes == [2, -signal.SIGKILL], ended.said
    once(ended, "another process of this run has ended, or does not answer")
    once(ended, "Go on with:\n  torchrun --nproc-per-node 2 -m linearize run")
    checkpoint = storing.latest(out / "stage-1-whole")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"


def test_not_finite_in_one_process(teacher_folder: Path, every_stage: Recipe, tmp_path: Path) -> None:
    """Rows of another process, which the one that speaks does not have."""
    recipe = sharded(every_stage, whole=every_stage.stages["whole"])
    ended = start(2, shard_jobs.not_finite, str(teacher_folder), recipe, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2, 2], ended.said
    once(ended, "stage 'whole', step 3: the gradient of model.layers.1.mlp.up_proj.weight is not finite")
    once(ended, "The step was not applied")


def test_a_disk_that_is_full_for_one(teacher_folder: Path, every_stage: Recipe, tmp_path: Path) -> None:
    recipe = sharded(every_stage, whole=every_stage.stages["whole"])
    ended = start(2, shard_jobs.full_disk, str(teacher_folder), recipe, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2, 2], ended.said
    once(ended, "the disk is full")


def test_tied_embeddings(tied_folder: Path, every_stage: Recipe, tmp_path: Path) -> None:
    """One table, read at both ends and trained once; activations computed twice, and two sequences at once."""
    stage = replace(every_stage.stages["whole"], gradient_checkpointing=True, micro_batch=2)
    stage = replace(stage, objective={"next_token": 1.0, "logits_kl": 0.5}, lr_mixers=1e-2, weight_decay=0.1)
    alone, out, model = tmp_path / "one", tmp_path / "run", str(tied_folder)
    plain = replace(sharded(every_stage, whole=stage), run=every_stage.run)
    assert start(1, run, model, plain, alone, folder=tmp_path / "a").codes == [0]
    ended = start(2, whole, model, sharded(every_stage, whole=stage), out, folder=tmp_path / "b")
    assert ended.codes == [0, 0], ended.said
    assert_equal(out, alone)
    made = linearize.load(out / "checkpoint")
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_passes_in_sixteen_bits(teacher_folder: Path, every_stage: Recipe, tmp_path: Path) -> None:
    """Weights are gathered in the dtype of the passes; masters, gradients and moments are float32."""
    narrow = replace(every_stage, run=replace(every_stage.run, precision="bf16"))
    alone, out, model = tmp_path / "one", tmp_path / "run", str(teacher_folder)
    plain = replace(sharded(narrow, whole=narrow.stages["whole"]), run=narrow.run)
    assert start(1, run, model, plain, alone, folder=tmp_path / "a").codes == [0]
    ended = start(2, run, model, sharded(narrow, whole=narrow.stages["whole"]), out, folder=tmp_path / "b")
    assert ended.codes == [0, 0], ended.said
    for key in ("loss", "grad_norm"):
        losses = [[line[key] for line in lines(folder)] for folder in (alone, out)]
        assert losses[1] == pytest.approx(losses[0], rel=0.05), key
    dtypes = {tensor.dtype for tensor in finals(out)["stage-1-whole"].values()}
    assert dtypes == {torch.float32}


@pytest.mark.slow
def test_adapters_apart_and_ablations(teacher_folder: Path, every_stage: Recipe, tmp_path: Path) -> None:
    """An adapter beside the export, a layer that stays softmax, mixers that are switched off and drawn anew."""
    stage = every_stage.stages["recover"]
    assert stage.lora is not None
    stage = replace(stage, lora=replace(stage.lora, merge=False))
    recipe = sharded(every_stage, transfer=every_stage.stages["transfer"], recover=stage)
    recipe = replace(recipe, layers=[1], eval=replace(recipe.eval, ablations=True))
    alone, out, model = tmp_path / "one", tmp_path / "run", str(teacher_folder)
    assert start(1, run, model, recipe, alone, folder=tmp_path / "a").codes == [0]
    ended = start(2, whole, model, recipe, out, folder=tmp_path / "b")
    assert ended.codes == [0, 0], ended.said
    assert_equal(out, alone)
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (out, alone)]
    assert [row["name"] for row in rows[0]] == [row["name"] for row in rows[1]] and len(rows[0]) == 7
    for mine, theirs in zip(*rows, strict=True):
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3), mine["name"]
    made = linearize.load(out / "checkpoint")
    texts = data.validation_documents(recipe.data, byte_tokenizer())
    cut = windows(byte_tokenizer(), texts, window=64, max_windows=2)
    bare = perplexity(made, None, cut).value
    adapted = perplexity(load_adapter(made, out / "checkpoint" / "adapter"), None, cut).value
    expected = {row["name"]: row["perplexity"][data.HELD_OUT] for row in rows[0]}
    assert adapted == pytest.approx(expected["after recover"], rel=1e-4)
    assert bare == pytest.approx(expected["after transfer"], rel=1e-4)


def test_refusals(teacher_folder: Path, tied_folder: Path, every_stage: Recipe, tmp_path: Path) -> None:
    stage = every_stage.stages["whole"]
    odd = sharded(every_stage, whole=replace(stage, batch_size=5, tokens=5 * 64))
    ended = start(2, run, str(teacher_folder), odd, tmp_path / "odd", folder=tmp_path)
    assert ended.codes == [2, 2]
    once(ended, "stages.whole.batch_size: 5 sequences are not as many for each of 2 processes")
    untied = sharded(every_stage, whole=replace(stage, untie=True))
    ended = start(2, run, str(tied_folder), untied, tmp_path / "untied", folder=tmp_path)
    assert ended.codes == [2, 2]
    once(ended, "stages.whole.untie: tied embeddings are one shard and stay tied")
    assert not (tmp_path / "odd").exists() and not (tmp_path / "untied").exists()
    ended = start(2, shard_jobs.shared, tmp_path, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said
    assert {path.name for path in tmp_path.glob("refused-*")} == {"refused-0", "refused-1"}


@pytest.mark.slow
def test_every_family(tmp_path: Path) -> None:
    ended = start(2, shard_jobs.families, tmp_path, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


def test_when_weights_are_sharded(every_stage: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto asks the plan, on cards alone; a plan without formulas for a model leaves it whole."""
    known = SimpleNamespace(name="card", total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    monkeypatch.setattr(placing.models, "load_config", lambda source: source)
    answers: list[Any] = []
    asked = []

    def ways(source: str, recipe: Recipe, count: int, card: Any) -> dict[str, str]:
        asked.append((source, count, card.memory))
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    monkeypatch.setattr(stages, "ways", ways)

    def wanted(shard: str, device: str, *found: Any) -> bool:
        answers[:] = found
        recipe = replace(every_stage, run=replace(every_stage.run, shard=shard))
        place = placing.Place("model", recipe, torch.device(device), torch.float32, None)
        assert not place.sharded  # there is one process
        return place._wanted()

    assert wanted("full", "cpu") and not wanted("none", "cuda") and not wanted("auto", "cpu")
    assert not asked
    assert wanted("auto", "cuda", {"a": "ddp", "b": "sharded"})
    assert not wanted("auto", "cuda", {"a": "ddp", "b": "one card"})
    assert not wanted("auto", "cuda", LinearizeError("a mixture of experts"))
    assert asked == [("model", 1, 2.0**34)] * 3
