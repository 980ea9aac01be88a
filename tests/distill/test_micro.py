"""As many sequences at once as fit: the same step, halved in its middle, remembered, and one error at the end."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from short_stages import LENGTH, trained
from torch import Tensor

from linearize import cli, config, distill
from linearize.config.check import check
from linearize.config.schema import Recipe, StageConfig, TeacherConfig
from linearize.distill import memory
from linearize.distill.blocks import Blocks
from linearize.distill.continuing import changes
from linearize.distill.finetune import FinetuneTrainer
from linearize.distill.memory import Fitting
from linearize.distill.micro import MicroBatch, divisor
from linearize.distill.stage import StageTrainer
from linearize.distill.transfer import TransferTrainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.19 GiB is free."
)


def holding(most: int, patch: pytest.MonkeyPatch, *, late: bool = True, step: int = 0) -> list[int]:
    """A device that holds so many sequences, from a step on; gives the sizes of what it was asked to hold.

    Args:
        late: it fails only once gradients are there.
    """
    asked: list[int] = []
    for kind in (TransferTrainer, FinetuneTrainer):
        own = kind.micro_step

        def micro_step(self: Any, model: Any, batch: Any, count: Any, own: Any = own) -> Tensor:
            asked.append(len(batch["input_ids"]))
            over = asked[-1] > most and self.state.global_step >= step
            if over and not late:
                raise FULL
            values = own(self, model, batch, count)
            if over:
                raise FULL
            return values

        patch.setattr(kind, "micro_step", micro_step)
    return asked


def lines(out: Path) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in kept]


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    """Two stages of eight sequences a step, adapters' dropout among them."""
    made = make_recipe(batch_size=8, tokens=5 * 8 * 64, save_every=2)
    made.stages["transfer"].objective = {"attention_output": 1.0}
    made.eval.ablations = False
    return made


def test_sizes() -> None:
    assert [divisor(12, most) for most in (12, 11, 6, 5, 1, 0)] == [12, 6, 6, 4, 1, 1]
    for setting, device, size in (("auto", CUDA, 96), ("auto", CPU, 8), (32, CPU, 32)):
        assert (
            MicroBatch(StageConfig(batch_size=96, micro_batch=setting), "s", [(96, 1024)], device).size
            == size
        )
    for length, size in ((2048, 48), (65_536, 2), (1 << 20, 1)):
        assert MicroBatch(StageConfig(batch_size=96), "s", [(96, length)], CUDA).size == size
    assert Fitting("auto", length=65_536).most == 2
    found = MicroBatch(StageConfig(batch_size=96), "s", [(96, 1024)], CUDA)
    for saved, size in ((None, 96), ("x", 96), (7, 96), (24, 24), (48, 24)):
        found.remember({"96x1024": saved})
        assert found.size == size
    fixed = MicroBatch(StageConfig(batch_size=96, micro_batch=32), "s", [(96, 1024)], CUDA)
    fixed.remember({"96x1024": 8})
    assert fixed.size == 32


def test_halving_in_a_step_gives_what_the_smaller_number_gives(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Bit by bit, dropout of adapters included, although half of a step had its gradients already."""
    small = copy.deepcopy(recipe)
    for stage in small.stages.values():
        stage.micro_batch = 2
    distill.run(str(teacher_folder), small, tmp_path / "small")
    with monkeypatch.context() as patch:
        asked = holding(2, patch)
        distill.run(str(teacher_folder), recipe, tmp_path / "found")
    assert asked == 2 * [8, 4, *20 * [2]]
    assert lines(tmp_path / "found") == lines(tmp_path / "small")
    assert "stage 'transfer': 8 sequences at once do not fit into memory; going on with 4" in caplog.text
    done = json.loads(next((tmp_path / "found").glob("stage-2-*/done.json")).read_text())
    assert done["micro_batch"] == 2


def test_a_resumed_stage_remembers(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages["recover"].lora.dropout = 0.0
    distill.run(str(teacher_folder), recipe, tmp_path / "whole")
    out, own = tmp_path / "run", StageTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(memory.OutOfMemoryError, match=r"step 5 \(2.50 GiB"):
        holding(4, patch, late=False, step=2)

        def training_step(self: Any, *arguments: Any) -> Any:
            if self.state.global_step == 4:
                raise FULL
            return own(self, *arguments)

        patch.setattr(StageTrainer, "training_step", training_step)
        distill.run(str(teacher_folder), recipe, out)
    with monkeypatch.context() as patch:
        asked = holding(4, patch)
        distill.run(str(teacher_folder), recipe, out, resume=True)
    assert asked[:2] == [4, 4] and asked[2] == 8, "the first stage goes on with 4, the second begins with all"
    for one, two in zip(lines(out), lines(tmp_path / "whole"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_where_not_one_fits_there_is_one_error(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(recipe))
    asked = holding(0, monkeypatch)
    arguments = ["run", str(teacher_folder), str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert asked == [8, 4, 2, 1]
    assert (
        "out of memory in stage 'transfer', step 1 (2.50 GiB asked for, 1.19 GiB of 79.11 GiB free)" in said
    )
    assert "data.length" in said and "--resume" in said and "Traceback" not in said


def test_a_given_number_stays_and_the_remedy_is_auto(
    teacher_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.stages["transfer"].micro_batch = 4
    asked = holding(2, monkeypatch)
    with pytest.raises(memory.OutOfMemoryError, match=r"--resume stages\.transfer\.micro_batch=auto"):
        distill.run(str(teacher_folder), recipe, tmp_path / "run")
    assert asked == [4]


@pytest.mark.parametrize(
    ("first", "most", "looks", "size"), [(3, 8, [4, 2], 8), (3, 4, [4, 2], 4), (0, 8, [4, 2, 1], 0)]
)
def test_a_first_pass_that_takes_more_memory_than_the_others_does_not_decide(
    first: int,
    most: int,
    looks: list[int],
    size: int,
    teacher_folder: Path,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    """It is made of fewer sequences, for nothing but the look; the step is the one that it would have been.

    Args:
        first: sequences that the device holds in the pass that runs part by part.
        most: in the others.
        looks: sizes that are tried for the look.
        size: what the stage goes on with; 0: not one fits.
    """
    recipe.stages = {"recover": recipe.stages["recover"]}
    recipe.run.compile = "always"
    monkeypatch.setattr(Blocks, "compiled", lambda self: nullcontext())
    with monkeypatch.context() as patch:
        patch.setattr(recipe.stages["recover"], "micro_batch", size or 8)
        distill.run(str(teacher_folder), recipe, tmp_path / "plain")
    own, asked = FinetuneTrainer.micro_step, []

    def micro_step(self: Any, model: Any, batch: Any, count: Any) -> Tensor:
        asked.append(len(batch["input_ids"]))
        values = own(self, model, batch, count)
        if asked[-1] > (most if self.passes._looked_at else first):
            raise FULL
        return values

    monkeypatch.setattr(FinetuneTrainer, "micro_step", micro_step)
    if not size:
        with pytest.raises(memory.OutOfMemoryError, match=r"in stage 'recover', step 1 \(2.50 GiB"):
            distill.run(str(teacher_folder), recipe, tmp_path / "found")
        assert asked == [8, *looks]
        return
    with caplog.at_level("INFO", logger="linearize"):
        distill.run(str(teacher_folder), recipe, tmp_path / "found")
    halved = [8] if size < 8 else []
    assert asked == [8, *looks, *halved, *5 * (8 // size) * [size]]
    assert lines(tmp_path / "found") == lines(tmp_path / "plain")
    assert "the first pass, which takes more memory than the others, was made of 2 sequences" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", ["transfer", "all_kl"])
def test_a_card_whose_memory_runs_out(stage: str, tmp_path: Path, caplog: Any) -> None:
    """A real one, with part of its memory: recorded steps of the whole batch, of half of it or less, and by hand."""
    settings = {"batch_size": 512, "micro_batch": "auto", "tokens": 8 * 512 * LENGTH}
    memory.release(torch.device("cuda"))
    held = torch.cuda.memory_reserved()  # of tests that this process ran before
    torch.cuda.reset_peak_memory_stats()
    losses = trained(tmp_path / "whole", "lolcats", stage, 8, capture=True, **settings)[0]
    assert "do not fit into memory" not in caplog.text
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    memory.release(torch.device("cuda"))
    torch.cuda.set_per_process_memory_fraction((held + 0.4 * (peak - held)) / total)
    try:
        halved = trained(tmp_path / "halved", "lolcats", stage, 8, capture=True, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "512 sequences at once do not fit into memory; going on with" in caplog.text
    torch.testing.assert_close(torch.tensor(halved[0]), torch.tensor(losses), rtol=1e-2, atol=1e-4)
    assert halved[2].graph is not None, halved[2].obstacle


def test_evaluation_halves_too() -> None:
    def job(size: int) -> int:
        asked.append(size)
        if size > 2:
            raise FULL
        return size

    asked: list[int] = []
    fitting = Fitting("auto")
    assert [fitting.run(job, CPU), fitting.run(job, CPU)] == [2, 2] and asked == [4, 2, 2]
    for setting in (4, "auto"):
        with pytest.raises(torch.OutOfMemoryError):
            Fitting(setting).run(lambda size: job(size + 2), CPU)
    with pytest.raises(ValueError, match="no"):
        Fitting("auto").run(lambda size: int("no"), CPU)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"micro_batch": 3},
            "micro_batch: 3 does not divide batch_size 8, and every pass of a step has one shape; take 2 ",
        ),
        ({"micro_batch": 0}, "micro_batch: must be at least 1 and at most 65536, or auto, got 0"),
        ({"micro_batch": "many"}, "or auto, got 'many'"),
        (
            {"grad_accum": 4},
            "set stages.transfer.batch_size=32 and take grad_accum out (~stages.transfer.grad_accum)",
        ),
        ({"grad_accum": "x"}, "set stages.transfer.batch_size=batch_size x grad_accum"),
    ],
)
def test_recipes_are_told(changed: dict[str, Any], says: str, recipe: Recipe) -> None:
    import dataclasses

    raw = dataclasses.asdict(recipe)
    raw["stages"]["transfer"] |= changed
    _, problems = check(raw)
    assert len(problems) == 1 and says in problems[0]
    raw["stages"]["transfer"] |= {"micro_batch": "auto", "grad_accum": 1}
    assert check(raw)[1] == [] and check({**raw, "eval": {"batch_size": "some"}})[1]


def test_a_run_from_when_there_was_grad_accum_goes_on() -> None:
    old = {"stages": {"s": {"batch_size": 2, "grad_accum": 4}}}
    data = {"mix": {}, "teacher": asdict(TeacherConfig())}
    new = {
        "calibrate": {"tokens": 0},
        "data": data,
        "stages": {"s": {"batch_size": 8, "micro_batch": "auto", "clip_by": "all"}},
    }
    found = changes(old, new)
    assert found.accepted == ["stages.s.micro_batch: 2 -> auto"] and not found.refused
    assert changes(old, {**new, "stages": {"s": {"batch_size": 2, "micro_batch": "auto"}}}).refused
    assert changes(old, {**new, "calibrate": {"tokens": 4096}}).refused == ["calibrate.tokens: 0 -> 4096"]
