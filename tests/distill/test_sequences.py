"""Several processes that hold each sequence together train what one trains: losses, gradients' norms, weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import several_jobs as jobs
from several import run, start, whole
from several_recipes import assert_equal, enough_cards, once

from linearize import launched
from linearize.config import to_yaml
from linearize.config.schema import CalibrateConfig, Recipe, StageConfig, StageDataConfig

MIXERS: dict[str, dict[str, Any]] = {
    "window": {"feature_map": {"name": "none"}, "window": {"name": "sliding", "size": 8, "first": 2}},
    "delta": {
        "feature_map": {"name": "identity"},
        "normalizer": {"name": "none"},
        "update": {"name": "delta"},
        "gate": {"name": "mamba2"},
        "short_conv": {"name": "depthwise"},
        "window": {"name": "none"},
    },
    "decay": {
        "feature_map": {"name": "elu"},
        "normalizer": {"name": "none"},
        "gate": {"name": "low_rank"},
        "window": {"name": "none"},
    },
    "in turn": {
        "feature_map": {"name": "elu"},
        "window": {"name": "terraced", "size": 8},
        "combine": {"name": "shared_normalizer"},
    },
}
"""Beside that of `every_stage`, which is additive behind a window."""


@pytest.fixture(autouse=True)
def as_many_cards(request: pytest.FixtureRequest) -> None:
    enough_cards(request)


@pytest.fixture(scope="module")
def recipe(every_stage: Recipe) -> Recipe:
    """Without pairs, whose answers are padded."""
    stages = {name: stage for name, stage in every_stage.stages.items() if name != "prefer"}
    return replace(every_stage, stages=stages)


Reference = Callable[..., tuple[Recipe, Path]]


@pytest.fixture(scope="module")
def of_one(recipe: Recipe, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A recipe with some changes, and what one process makes of it; each is made once."""
    known: dict[str, tuple[Recipe, Path]] = {}

    def make(name: str = "", **changes: Any) -> tuple[Recipe, Path]:
        if name not in known:
            folder = tmp_path_factory.mktemp("one")
            changed = replace(recipe, **changes)
            ended = start(1, run, str(teacher_folder), changed, folder / "run", folder=folder)
            assert ended.codes == [0], ended.said
            known[name] = changed, folder / "run"
        return known[name]

    return make


def spread(recipe: Recipe, size: int = 2, **settings: Any) -> Recipe:
    return replace(recipe, run=replace(recipe.run, sequence=size, **settings))


@pytest.mark.parametrize(
    ("job", "shard"), [(run, "none"), (run, "full"), pytest.param(whole, "full", marks=pytest.mark.slow)]
)
def test_every_kind_of_stage(
    job: Any, shard: str, of_one: Reference, teacher_folder: Path, tmp_path: Path
) -> None:
    """Packed documents under a window and an additive state; adapters, all weights, the teacher as it was."""
    recipe, reference = of_one()
    ended = start(2, job, str(teacher_folder), spread(recipe, shard=shard), tmp_path / "run", folder=tmp_path)
    assert ended.codes == [0, 0], ended.said
    assert_equal(tmp_path / "run", reference)
    assert (tmp_path / "run" / "checkpoint").exists() == (job is whole)


@pytest.mark.slow
@pytest.mark.parametrize(("sequence", "shard"), [(2, "none"), (2, "full"), (4, "none"), (4, "full")])
@pytest.mark.processes(4)
def test_four_processes(
    sequence: int, shard: str, of_one: Reference, teacher_folder: Path, tmp_path: Path
) -> None:
    """Two groups of two with sequences of their own, or all four with the same."""
    recipe, reference = of_one()
    asked = spread(recipe, sequence, shard=shard)
    ended = start(4, run, str(teacher_folder), asked, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [0] * 4, ended.said
    assert_equal(tmp_path / "run", reference)


@pytest.mark.parametrize(
    "kind", ["delta", *(pytest.param(kind, marks=pytest.mark.slow) for kind in MIXERS if kind != "delta")]
)
def test_hybrids(kind: str, recipe: Recipe, of_one: Reference, teacher_folder: Path, tmp_path: Path) -> None:
    """One layer's softmax stays and trains; texts without borders too, whose positions go on over a cut."""
    stages = {
        "transfer": replace(
            recipe.stages["transfer"],
            objective={"attention_output_relative": 1.0, "hidden_alignment": 1.0},
            micro_batch=4,
            data=StageDataConfig(length=128),
        ),
        "whole": replace(
            recipe.stages["whole"],
            objective={"logits_kl": 1.0, "next_token": 0.3},
            gradient_checkpointing=True,
            top_k=8,
        ),
    }
    if kind == "window":  # nothing of it trains
        del stages["transfer"]
    changed = {"mixer": MIXERS[kind], "layers": {"keep": [1]}, "calibrate": CalibrateConfig(tokens=0)}
    asked, reference = of_one(kind, stages=stages, **changed)
    ended = start(2, run, str(teacher_folder), spread(asked), tmp_path / "run", folder=tmp_path)
    assert ended.codes == [0, 0], ended.said
    assert_equal(tmp_path / "run", reference)


def test_stopped_and_resumed_by_one(of_one: Reference, teacher_folder: Path, tmp_path: Path) -> None:
    """SIGTERM to one of two that hold sequences together, then one process with whole ones, to the end."""
    recipe, reference = of_one()
    out, model = tmp_path / "run", str(teacher_folder)
    given = (model, spread(recipe), out, signal.SIGTERM, 1, ("recover", 2), False)
    ended = start(2, jobs.signalled, *given, folder=tmp_path / "a")
    assert ended.codes == [143, 143], ended.said
    once(ended, "stopped in stage 'recover' after step 3 of 4")
    ended = start(1, run, model, recipe, out, True, folder=tmp_path / "b")
    assert ended.codes == [0], ended.said
    assert_equal(out, reference)


def test_refusals(recipe: Recipe, every_stage: Recipe, teacher_folder: Path, tmp_path: Path) -> None:
    """All that cannot be spread at once, before any weight is loaded."""
    stages = {
        "prefer": every_stage.stages["prefer"],
        "orient": StageConfig(objective={"mixing_matrix": 1.0}, data=StageDataConfig(length=63)),
        "drop": replace(recipe.stages["transfer"], window_dropout=0.5),
    }
    mixer = {"feature_map": {"name": "none"}, "window": {"name": "full"}}
    wrong = spread(replace(recipe, stages=stages, mixer=mixer))
    ended = start(2, run, str(teacher_folder), wrong, tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2, 2]
    for words in (
        "stages.prefer.objective: 'dpo' is no sum over tokens",
        "stages.orient.objective: 'mixing_matrix'",
        "stages.orient.data.length: 63 tokens are not as many for each of run.sequence=2 processes",
        "stages.drop.window_dropout: which queries count",
        "mixer.window: 'full' keeps every key",
    ):
        once(ended, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.processes(3)
def test_a_number_that_does_not_divide(recipe: Recipe, teacher_folder: Path, tmp_path: Path) -> None:
    ended = start(3, run, str(teacher_folder), spread(recipe), tmp_path / "run", folder=tmp_path)
    assert ended.codes == [2] * 3
    once(ended, "run.sequence: 2 processes are to hold each sequence, and 3 are no multiple of that")


@pytest.mark.slow
def test_a_launcher(every_stage: Recipe, recipe: Recipe, teacher_folder: Path, tmp_path: Path) -> None:
    """torchrun around the command line, from a recipe's file to the exported model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(replace(recipe, calibrate=CalibrateConfig(tokens=0))))
    for name, launcher, given in (
        ("one", [], []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ["run.sequence=2"]),
    ):
        command = [
            sys.executable,
            *launcher,
            "-m",
            "linearize",
            "run",
            str(teacher_folder),
            str(path),
            *given,
        ]
        ended = subprocess.run(
            [*command, "--out", str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=400,
            env=launched.without(os.environ) | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert_equal(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / "checkpoint" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["delta", "in turn"])
def test_a_killed_process(kind: str, recipe: Recipe, teacher_folder: Path, tmp_path: Path) -> None:
    """The other one, which waits for its tokens, says so in our words."""
    stages = {"whole": recipe.stages["whole"]}
    changed = replace(recipe, stages=stages, mixer=MIXERS[kind], calibrate=CalibrateConfig(tokens=0))
    given = (str(teacher_folder), spread(changed), tmp_path / "run", signal.SIGKILL, 1, ("whole", 3), False)
    ended = start(2, jobs.signalled, *given, folder=tmp_path)
    assert ended.codes == [2, -signal.SIGKILL], ended.said
    once(ended, "another process of this run has ended, or does not answer")
    once(ended, "Go on with:\n  torchrun --nproc-per-node 2 -m linearize run")
