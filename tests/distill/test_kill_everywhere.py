"""A run that is killed, or finds the disk full, at any change of its folder goes on to the very same result."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_operations import KILLED, REFUSED, Operations, fill_the_disk, forked, kill

from linearize import distill
from linearize.config.schema import Recipe
from linearize.distill.lock import LOCK, OWNER

pytestmark = [
    pytest.mark.skipif(
        not hasattr(os, "fork") or not os.path.exists("/proc/self/fd"), reason="forks, and reads /proc"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork"),
]
QUICK = 31
"""Every n-th operation without `-m slow`; not a divisor of what repeats."""


class Trial:
    """The same small run, again and again.

    Args:
        teacher: MODEL.
        recipe: two stages with a checkpoint in the middle, adapters merged.
        folder: for run folders and logs.
    """

    def __init__(self, teacher: Path, recipe: Recipe, folder: Path) -> None:
        self.teacher, self.recipe, self.folder = teacher, recipe, folder
        self.log = folder / "log"
        self.out = folder / "run"
        code, self.operations = self.go()
        assert code == 0, self.log.read_text()
        self.expected = described(self.out)

    def go(
        self, at: int = 0, action: Callable[[Operations], None] | None = None, *, resume: bool = True
    ) -> tuple[int, int]:
        """Run or go on in `out`; exit code and operations."""
        return forked(
            lambda: distill.run(str(self.teacher), self.recipe, self.out, resume=resume),
            Operations(self.out, at, action),
            self.log,
        )

    def begin(self, at: int, action: Callable[[Operations], None]) -> int:
        """A new run up to an operation; its exit code."""
        shutil.rmtree(self.out, ignore_errors=True)
        return self.go(at, action)[0]

    def ends_well(self) -> None:
        """Go on, and hold what comes out against the run that nothing happened to."""
        killed_after_the_end = (self.out / "done.json").is_file()
        if not killed_after_the_end:
            # a folder that is no run yet is taken by the plain command too
            code, _ = self.go(resume=(self.out / "recipe.yaml").is_file())
            assert code == 0, self.log.read_text()
        found = described(self.out)
        # a process that dies between its last file and its end leaves a lock that the kernel has dropped
        left = found.keys() - {LOCK, OWNER} if killed_after_the_end else found.keys()
        differing = sorted(left ^ self.expected.keys())
        assert not differing
        for name, content in self.expected.items():
            assert found[name] == content, name


def described(out: Path) -> dict[str, Any]:
    """Every file of a run folder: weights, results and metrics in full, of the others that they are there."""
    files: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors" or name == "results.json":
            files[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            files[name] = [{**line, "tokens_per_second": None} for line in lines]
        else:
            files[name] = path.is_file()
    return files


@pytest.fixture(scope="module")
def trial(
    teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory, module_recipe: Callable[..., Recipe]
) -> Trial:
    torch.set_num_threads(1)
    recipe = module_recipe(tokens=3 * 2 * 64, save_every=1)
    recipe.eval.ablations = False
    recipe.eval.max_windows = 1
    return Trial(teacher_folder, recipe, tmp_path_factory.mktemp("trial"))


def places(trial: Trial, every: int, seed: int) -> list[int]:
    """Numbers of operations, from another start for each kind of trial."""
    return list(range(1 + seed % every, trial.operations + 1, every))


def test_the_run_has_what_to_kill(trial: Trial) -> None:
    assert trial.operations > 100
    assert {
        "checkpoint/model.safetensors",
        "metrics.jsonl",
        "results.json",
        "done.json",
    } <= trial.expected.keys()
    assert not [name for name in trial.expected if Path(name).name.startswith(".")]


@pytest.mark.parametrize("every", [QUICK, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_operation(trial: Trial, every: int) -> None:
    for number in places(trial, every, seed=0):
        assert trial.begin(number, kill) == KILLED, number
        trial.ends_well()


@pytest.mark.parametrize("every", [3 * QUICK, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_at_every_operation(trial: Trial, every: int) -> None:
    """Refused in words, and nothing is lost; where a removal fails the run may also simply go on."""
    for number in places(trial, every, seed=5):
        code = trial.begin(number, fill_the_disk)
        assert code in (0, REFUSED), (number, trial.log.read_text())
        if code == REFUSED:
            assert "disk is full" in trial.log.read_text() or "No space left" in trial.log.read_text(), number
        trial.ends_well()


@pytest.mark.slow
def test_killed_again_while_it_goes_on(trial: Trial) -> None:
    draw = random.Random(0)
    for _ in range(60):
        assert trial.begin(draw.randrange(1, trial.operations + 1), kill) == KILLED
        for _ in range(2):
            trial.go(draw.randrange(1, trial.operations), kill)
        trial.ends_well()
