"""Writers and workers that are cut off, several workers at once, little room on the disk, and what is damaged."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blocked
import pytest
import several
import several_jobs
import torch
from interrupted import Crash, at_step, crash, press_ctrl_c

from linearize.config.schema import Recipe
from linearize.distill import RunStopped
from linearize.distill.blockwise import streams, writing
from linearize.distill.blockwise.job import Job
from linearize.distill.blockwise.joining import join
from linearize.distill.blockwise.streams import Writer
from linearize.distill.blockwise.training import train
from linearize.distill.blockwise.writing import write
from linearize.errors import (
    CheckpointError,
    LinearizeError,
    RecipeError,
    RunFolderError,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return blocked.teacher(tmp_path_factory.mktemp("teacher"), layers=3)


@pytest.fixture(scope="module")
def reference(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks that nobody interrupted."""
    out = tmp_path_factory.mktemp("reference") / "run"
    blocked.in_blocks(source, blocked.recipe(source), out)
    return out


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows each."""
    monkeypatch.setattr(streams, "CHUNK", 1)


def same(out: Path, reference: Path) -> None:
    blocked.assert_equal(out, reference, ["stage-1-transfer"])


def test_a_writer_that_is_killed_goes_on_with_the_next_chunk(
    source: str, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, put = blocked.recipe(source), Writer.put
    wrote: list[str] = []

    def failing(after: int) -> Any:
        def one(self: Writer, values: torch.Tensor) -> None:
            if len(wrote) == after:
                raise Crash
            put(self, values)
            wrote.append(self.path.stem)

        return one

    for after in (1, 4, 5):
        monkeypatch.setattr(Writer, "put", failing(after))
        with pytest.raises(Crash):
            write(Job(source, recipe, tmp_path / "run"))
    # a line that was cut off, and a chunk that did not reach the disk
    [progress] = (tmp_path / "run/streams/stage-1-transfer").glob("*.progress")
    with progress.open("a") as file:
        file.write("0123")
    monkeypatch.setattr(Writer, "put", failing(-1))
    write(Job(source, recipe, tmp_path / "run"))
    assert wrote == [name for name in ("000", "001", "002") for _ in range(4)]
    train(Job(source, recipe, tmp_path / "run"))
    join(Job(source, recipe, tmp_path / "run"))
    same(tmp_path / "run", reference)


def test_a_chunk_that_is_not_what_its_line_says_is_written_again(source: str, tmp_path: Path) -> None:
    layout = streams.Layout.of(6, 4, 8, torch.bfloat16, 2)
    values = torch.randn(6, 4, 8).to(torch.bfloat16)
    writer = Writer(tmp_path, "000", layout, {"text": "a"})
    writer.put(values[:2])
    writer.put(values[2:4])
    with writer.path.open("r+b") as file:
        file.seek(3 * layout.row)
        file.write(b"??")
    again = Writer(tmp_path, "000", layout, {"text": "a"})
    assert again.done == 1
    assert Writer(tmp_path, "000", layout, {"text": "b"}).done == 0
    again = Writer(tmp_path, "000", layout, {"text": "a"})
    assert again.done == 0
    for start in (0, 2, 4):
        again.put(values[start : start + 2])
    again.finish()
    read = streams.Stream(tmp_path, "000", layout, {"text": "a"})
    assert torch.equal(torch.stack([read.row(index) for index in range(6)]), values)
    assert torch.equal(read.chunk(1), values[2:4])


def test_a_worker_that_is_killed_goes_on_from_its_checkpoint(
    source: str, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = blocked.recipe(source), tmp_path / "run"
    write(Job(source, recipe, out))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, "transfer", 3, crash)
        train(Job(source, recipe, out))
    with (
        monkeypatch.context() as patch,
        pytest.raises(RunStopped, match=r"block 0 after step 3 of 4[^\0]*linearize blocks train"),
    ):
        at_step(patch, "transfer", 3, press_ctrl_c)
        train(Job(source, recipe, out), [0])
    assert train(Job(source, recipe, out)).trained == [0, 1, 2]
    join(Job(source, recipe, out))
    same(out, reference)


@pytest.mark.job
def test_two_workers_in_processes_of_their_own(source: str, reference: Path, tmp_path: Path) -> None:
    """Through the command line; while one is at a block the other leaves it alone."""
    out = tmp_path / "run"
    settings = ["stages.transfer.micro_batch=2", "run.device=cpu"]
    recipe = reference / "recipe.yaml"

    def said(step: str, name: str = "") -> str:
        line = ["blocks", step, source, str(recipe), *settings, "--out", str(out)]
        ended = several.start(1, several_jobs.command, line, folder=tmp_path / f"{step}{name}")
        assert ended.codes == [0], ended.said
        return ended.said

    assert "linearize blocks train" in said("write")
    with ThreadPoolExecutor(2) as threads:
        workers = list(threads.map(lambda name: said("train", name), ("-one", "-two")))
    if "join them" not in "".join(workers):  # each left the other's block alone and ended before it
        said("train")
    assert "linearize run" in said("join")
    found = [json.loads((out / f"stage-1-transfer/block-00{n}/done.json").read_text()) for n in range(3)]
    assert [one["micro_batch"] for one in found] == [2, 2, 2]
    assert not list((out / "streams").rglob("*.bin"))
    same(out, reference)


def test_a_block_that_another_worker_is_at(source: str, tmp_path: Path) -> None:
    from linearize.distill.lock import held

    recipe, out = blocked.recipe(source), tmp_path / "run"
    write(Job(source, recipe, out))
    with held(out / "stage-1-transfer/block-001"):
        found = train(Job(source, recipe, out), [1])
    assert (found.trained, found.others, found.left) == ([], [1], [0, 1, 2])
    with pytest.raises(LinearizeError, match="blocks 0, 1, 2 are not trained yet"):
        join(Job(source, recipe, out))


def test_streams_of_two_blocks_at_once(source: str, reference: Path, tmp_path: Path) -> None:
    recipe, out = blocked.recipe(source), tmp_path / "run"
    with pytest.raises(LinearizeError, match="--keep 1: a stream is written from the one before it"):
        write(Job(source, recipe, out), keep=1)
    seen = []
    for _ in range(3):
        found = write(Job(source, recipe, out), keep=2)
        seen.append((found.ready, found.waits, len(list((out / "streams").rglob("*.bin")))))
        train(Job(source, recipe, out), found.ready[:1])
    assert seen == [([0, 1], True, 2), ([1, 2], False, 2), ([2], False, 2)]
    # inputs that were lost are made from the first ones again
    (out / "streams/stage-1-transfer/001.json").unlink()
    (out / "streams/stage-1-transfer/002.json").unlink()
    shutil.rmtree(out / "stage-1-transfer/block-002")
    assert write(Job(source, recipe, out), keep=2).ready == [2]
    train(Job(source, recipe, out))
    assert write(Job(source, recipe, out)).trained == [0, 1, 2]
    join(Job(source, recipe, out))
    same(out, reference)


def test_too_little_room_on_the_disk(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "linearize")
    usage = writing.shutil.disk_usage(tmp_path)
    each = 8 * 64 * 32 * 4  # sequences, tokens, width, float32
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage._replace(free=int(2.5 * each)))
    job = Job(source, blocked.recipe(source), tmp_path / "run")
    with pytest.raises(LinearizeError, match=r"3 streams of .*are free: give --keep 2"):
        write(job)
    assert "3 blocks of 1 layers" in caplog.text
    assert not list((tmp_path / "run").rglob("*.bin"))
    assert write(Job(source, blocked.recipe(source), tmp_path / "run"), keep=2).waits


@pytest.fixture
def written(source: str, tmp_path: Path) -> tuple[Recipe, Path]:
    recipe = blocked.recipe(source)
    write(Job(source, recipe, tmp_path / "run"))
    return recipe, tmp_path / "run"


def test_a_damaged_stream_is_refused(source: str, written: tuple[Recipe, Path]) -> None:
    recipe, out = written
    path = out / "streams/stage-1-transfer/001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:30_000] + b"?" + whole[30_001:])
    with pytest.raises(
        CheckpointError, match=r"001.bin: rows 2 to 3 are not what was written .* write again"
    ):
        train(Job(source, recipe, out), [1])
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"001.bin: is truncated: it has [\d,]+ bytes of [\d,]+"):
        train(Job(source, recipe, out), [1])
    (out / "streams/stage-1-transfer/001.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"001.json: is of another shape"):
        train(Job(source, recipe, out), [1])
    (out / "streams/stage-1-transfer/001.json").unlink()
    assert train(Job(source, recipe, out), [1]).waiting == [1]
    write(Job(source, recipe, out))
    assert path.read_bytes() == whole
    assert train(Job(source, recipe, out), [1]).trained == [1]


def test_what_belongs_to_another_run_is_refused(
    source: str, written: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, out = written
    other = blocked.recipe(source, lr=1e-3)
    with pytest.raises(RunFolderError, match=r"stages.transfer.lr: 0.01 -> 0.001"):
        train(Job(source, other, out))
    stranger = blocked.teacher(tmp_path / "stranger", layers=2)
    with pytest.raises(RunFolderError, match=r"model: .* \(differs in config and weights\)"):
        train(Job(stranger, recipe, out))
    with pytest.raises(RunFolderError, match=r"run.precision: auto -> bf16|another precision"):
        narrow = blocked.recipe(source)
        narrow.run.precision = "bf16"
        train(Job(source, narrow, out))
    with pytest.raises(RunFolderError, match=r"--layers 2, it has 1"):
        write(Job(source, recipe, out), size=2)
    with pytest.raises(RunFolderError, match="holds no blocks"):
        train(Job(source, recipe, tmp_path / "nowhere"))
    said = json.loads((out / "blocks.json").read_text())
    assert said["size"] == 1


def test_another_text_is_refused(tmp_path: Path) -> None:
    source = blocked.teacher(tmp_path / "teacher", layers=2)
    recipe, out = blocked.recipe(source), tmp_path / "run"
    write(Job(source, recipe, out))
    text = Path(source) / "text.txt"
    text.write_text(text.read_text().replace("river", "brook"))
    with pytest.raises(CheckpointError, match=r"000.json: is of another text than this run's"):
        train(Job(source, recipe, out))


def test_a_result_that_is_damaged_is_not_joined(source: str, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    (out / "stage-1-transfer/done.json").unlink()
    path = out / "stage-1-transfer/block-002/final.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"block-002/final.safetensors: is not what was written"):
        join(Job(source, blocked.recipe(source), out))


def test_a_layer_without_anything_that_trains(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = blocked.recipe(source), tmp_path / "run"
    recipe.mixers = {"plain": {"feature_map": {"name": "none"}}}
    recipe.layers = {"use": {"plain": [1]}}
    write(Job(source, recipe, out))
    assert train(Job(source, recipe, out)).trained == [0, 2]
    join(Job(source, recipe, out))
    assert "layers 1 have nothing that trains" in caplog.text
    assert {"loss", "grad_norm"} < blocked.lines(out)[0].keys() and "layers" not in blocked.lines(out)[0]


def test_recipes_that_blocks_cannot_train(source: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages.transfer.clip_by: all clips by the norm over all layers"):
        Job(source, blocked.recipe(source, clip_by="all"), tmp_path)
    lengths = blocked.recipe(source, data=blocked.StageDataConfig(length=[32, 64]))
    with pytest.raises(RecipeError, match=r"stages.transfer.data.length: changes within the stage"):
        Job(source, lengths, tmp_path)
    whole = blocked.recipe(source, stages=3)
    whole.stages = {"recover": whole.stages["recover"]}
    with pytest.raises(RecipeError, match="the first one is no attention transfer"):
        Job(source, whole, tmp_path)
    taught = blocked.recipe(source)
    taught.data.source = "teacher"
    with pytest.raises(RecipeError, match="linearize sample"):
        Job(source, taught, tmp_path)


def test_workers_are_processes_by_themselves(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(LinearizeError, match=r"2 processes .* once for each card, without torchrun"):
        Job(source, blocked.recipe(source), tmp_path)


@pytest.mark.parametrize("where", ["inside", "between"])
def test_layers_that_read_more_than_the_stream_are_refused(
    where: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that adds its embeddings again in its second layer, or before its third."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def leaking(self: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if inputs_embeds is None:
            return forward(self, *args, **kwargs)

        def add(module: Any, given: tuple[Any, ...]) -> Any:
            return (given[0] + inputs_embeds, *given[1:])

        part = self.layers[1].mlp if where == "inside" else self.layers[2]
        handle = part.register_forward_pre_hook(add)
        part._forward_pre_hooks.move_to_end(handle.id, last=False)
        try:
            return forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(LlamaModel, "forward", leaking)
    with pytest.raises(LinearizeError, match="read more than the residual stream"):
        write(Job(source, blocked.recipe(source), tmp_path / "run"))
