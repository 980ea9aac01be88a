"""Blocks trained apart are what one process with the whole model trains: bit by bit on a processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import blocked
import pytest

from linearize import distill
from linearize.config.schema import Recipe
from linearize.distill import exporting


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their checkpoint, whose check takes most of the time."""
    monkeypatch.setattr(exporting, "checkpoint", lambda *_, **given: Path("nowhere"))


@pytest.fixture
def compared(tmp_path: Path, unexported: None) -> Callable[..., None]:
    """Runs a recipe in both ways."""

    def compare(change: Callable[[Recipe], None] = lambda recipe: None, size: int = 1, **given: Any) -> None:
        source = blocked.teacher(tmp_path / "teacher")
        recipe = blocked.recipe(source, **given)
        change(recipe)
        distill.run(source, recipe, tmp_path / "whole")
        blocked.in_blocks(source, recipe, tmp_path / "blocks", size)
        stages = sorted(folder.name for folder in (tmp_path / "whole").glob("stage-*"))
        blocked.assert_equal(tmp_path / "blocks", tmp_path / "whole", stages)

    return compare


def test_calibrated_two_stages_and_what_goes_on_from_them(tmp_path: Path, unexported: None) -> None:
    source = blocked.teacher(tmp_path / "teacher", layers=3)
    recipe = blocked.recipe(source, stages=3, calibrate=256)
    distill.run(source, recipe, tmp_path / "whole")
    blocked.in_blocks(source, recipe, tmp_path / "blocks", size=2)
    summary = distill.run(source, recipe, tmp_path / "blocks", resume=True)
    stages = ["stage-0-calibrate", "stage-1-transfer", "stage-2-align", "stage-3-recover"]
    blocked.assert_equal(tmp_path / "blocks", tmp_path / "whole", stages)
    assert [row["name"] for row in summary.rows][1:] == [
        "swapped, untrained",
        "calibrated",
        "after transfer",
        "after align",
        "after recover",
    ]


def test_a_hybrid_without_clipping(compared: Callable[..., None]) -> None:
    def change(recipe: Recipe) -> None:
        recipe.layers = [0, 3]
        recipe.stages["transfer"].grad_clip = 0.0
        recipe.stages["transfer"].clip_by = "all"

    compared(change, size=1)


def test_sixteen_bits(compared: Callable[..., None], tmp_path: Path) -> None:
    def change(recipe: Recipe) -> None:
        recipe.run.precision, recipe.run.weights = "bf16", "bfloat16"

    compared(change, size=2)
    said = (tmp_path / "blocks/blocks.json").read_text()
    assert '"weights": "bfloat16"' in said and '"passes": "bfloat16"' in said


@pytest.mark.slow  # test_families has its losses and gradients
def test_another_mixer_in_another_layer(compared: Callable[..., None]) -> None:
    def change(recipe: Recipe) -> None:
        recipe.mixers = {
            "delta": {
                "update": {"name": "delta"},
                "normalizer": {"name": "none"},
                "window": {"name": "none"},
            },
            "plain": {"feature_map": {"name": "none"}},
        }
        recipe.layers = {"use": {"delta": [1], "plain": [2]}}

    compared(change, size=2, calibrate=128)


@pytest.mark.slow  # test_families has its losses and gradients
def test_values_of_the_first_layer(compared: Callable[..., None]) -> None:
    def change(recipe: Recipe) -> None:
        recipe.mixer = {
            "feature_map": {"name": "identity"},
            "gate": {"name": "rwkv7"},
            "update": {"name": "rwkv7", "first_values": True, "first_rank": 2},
            "normalizer": {"name": "none"},
            "output": {"name": "gate", "rank": 4},
        }
        recipe.stages["transfer"].window_dropout = 0.0

    compared(change, size=1, calibrate=128)
