"""Out of memory anywhere in a run: one message, and the command in it goes on."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linearize import cli, distill, export, models, surgery
from linearize.config.schema import EvalConfig, Recipe, StageConfig
from linearize.distill import memory
from linearize.distill.results import Measurer
from linearize.distill.stage import StageTrainer

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1610612736 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"
)


def raising(error: BaseException, when: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 GiB, half of them free."""
    monkeypatch.setattr(memory, "machine", lambda: (2**31, 2**32))


FREE = "2.00 of the machine's 4.00 GiB free"


def really(job: Callable[[], object]) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        job()
    return caught.value


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (CPU, f" (1.50 GiB asked for, {FREE})"),
        (CUDA, " (2.50 GiB asked for)"),
        (
            torch.OutOfMemoryError(f"{CUDA} of which 1.19 GiB is free. Including non-PyTorch memory"),
            " (2.50 GiB asked for, 1.19 GiB of 79.11 GiB free)",
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 640 bytes."),
            f" (640 bytes asked for, {FREE})",
        ),
        (RuntimeError("CUDA error: out of memory"), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), f" ({FREE})"),
        (MemoryError(), f" ({FREE})"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), f" ({FREE})"),
        (really(lambda: torch.empty(2**46)), f" (262,144.00 GiB asked for, {FREE})"),
        (really(lambda: np.ones(2**46)), f" (512 TiB asked for, {FREE})"),
    ],
    ids=str,
)
def test_every_allocator_is_understood(error: BaseException, asked: str) -> None:
    with pytest.raises(memory.OutOfMemoryError) as stopped, memory.watched("here", lambda: "Do this."):
        raise error
    assert str(stopped.value) == f"out of memory here{asked}. Do this."


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not fit"),
        OSError(errno.ENOSPC, "full"),
        ValueError("out of memory of what I said"),
    ],
)
def test_nothing_else_is_taken_for_it(error: Exception) -> None:
    with pytest.raises(type(error)) as stopped, memory.watched("here", lambda: ""):
        raise error
    assert stopped.value is error


def test_what_is_left_to_give_up() -> None:
    for size, overrides in ((4, ["stages.s.micro_batch=auto"]), ("auto", []), (1, [])):
        stage = StageConfig(batch_size=8, micro_batch=size)
        assert memory.less_for_stage("s", stage, whole_model=False) == overrides
        whole = memory.less_for_stage("s", stage, whole_model=True)
        assert whole == [*overrides, "stages.s.gradient_checkpointing=true"]
    evaluations = [memory.less_for_evaluation(EvalConfig(batch_size=size)) for size in (8, "auto", 1)]
    assert evaluations == [["eval.batch_size=auto"], [], []]


def at(stage: str, step: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StageTrainer.training_step

    def training_step(self: StageTrainer, *arguments: Any, **options: Any) -> Any:
        if self.stage_name == stage and self.state.global_step + 1 == step:
            raise error
        return original(self, *arguments, **options)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)


def when_measuring(title: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Measurer.perplexities

    def perplexities(self: Measurer, model: Any, name: str, **options: Any) -> Any:
        if name == title:
            raise error
        return original(self, model, name, **options)

    monkeypatch.setattr(Measurer, "perplexities", perplexities)


PLACES: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], str, list[str]]] = {
    "load": (lambda patch: patch.setattr(models, "load_teacher", raising(CPU)), "loading", []),
    "teacher": (
        lambda patch: when_measuring("teacher", CPU, patch),
        "measuring the teacher",
        [],
    ),
    "surgery": (
        lambda patch: patch.setattr(surgery, "convert", raising(MemoryError())),
        "converting the model",
        [],
    ),
    "transfer": (
        lambda patch: at("transfer", 4, CUDA, patch),
        "in stage 'transfer', step 4 (2.50 GiB asked for)",
        [],
    ),
    "recover": (
        lambda patch: at("recover", 1, CPU, patch),
        "in stage 'recover', step 1 (1.50 GiB asked for, 2.00 of the machine's 4.00 GiB free)",
        [
            "stages.recover.gradient_checkpointing=true",
        ],
    ),
    "after": (
        lambda patch: when_measuring("after recover", CPU, patch),
        "measuring the model after stage 'recover'",
        [],
    ),
    "export": (lambda patch: patch.setattr(export, "save", raising(CPU)), "exporting", []),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_printed_command_goes_on(
    place: str,
    teacher_folder: Path,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command is run as it is printed, through the command line."""
    break_, where, overrides = PLACES[place]
    recipe = make_recipe(tokens=5 * 2 * 64)
    recipe.eval.ablations = False
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(memory.OutOfMemoryError) as stopped:
        break_(patch)
        distill.run(str(teacher_folder), recipe, out)
    text = str(stopped.value)
    assert text.startswith(f"out of memory {where}") and stopped.value.exit_code == 2
    if place == "load":
        assert not out.exists() and "the same command" in text
        return
    [command] = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    assert shlex.split(command)[-len(overrides) or None :] == overrides or not overrides
    assert cli.main(shlex.split(command)[1:]) == 0
    assert (out / "done.json").is_file() and "Traceback" not in capsys.readouterr().err
