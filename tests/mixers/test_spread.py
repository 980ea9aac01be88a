"""Mixers and softmax over sequences that several processes hold: what one process gives, and its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spread_jobs
from byte_llama import tiny_llama
from several import start
from several_recipes import enough_cards

from linearize.config import compose, list_recipes, variants
from linearize.config.schema import Recipe

WINDOW = {"name": "sliding", "size": 4}
NONE = {"name": "none"}
SHARED = {"name": "shared_normalizer"}
DELTA = {"feature_map": {"name": "identity"}, "normalizer": NONE, "update": {"name": "delta"}}
GATED = {"gate": {"name": "mamba2"}}
CONV = {"short_conv": {"name": "depthwise", "roles": "qkv"}}
AT_ONCE: dict[str, dict[str, Any]] = {
    "additive": {"feature_map": {"name": "elu"}, "window": NONE},
    "behind a window": {"feature_map": {"name": "hedgehog"}, "window": WINDOW, "combine": SHARED},
    "a decay per head": {"feature_map": {"name": "elu"}, "window": NONE, "gate": {"name": "scalar"}},
    "a decay per feature": {
        "feature_map": {"name": "elu"}, "window": NONE, "normalizer": NONE, "gate": {"name": "low_rank"}, **CONV,
    },
    "delta": {**DELTA, "window": NONE},
    "gated delta, convolved": {**DELTA, **GATED, **CONV, "window": NONE},
    "beside pinned tokens": {
        **DELTA, **GATED, "window": {**WINDOW, "first": 2, "overlap": True, "within": 8},
        "combine": {"name": "sigmoid"}, "position": {"name": "rope", "recurrent": False},
    },
    "generalized delta": {**DELTA, "window": NONE, "update": {"name": "gdn2"}, "gate": {"name": "kda"}},
    "a window alone": {"feature_map": NONE, "window": {**WINDOW, "first": 3, "sinks": "learned"}},
    "pinned tokens far away": {"feature_map": NONE, "window": {**WINDOW, "first": 3, "within": 9}},
}  # fmt: skip
IN_TURN: dict[str, dict[str, Any]] = {
    "blocks": {"feature_map": {"name": "elu"}, "window": {"name": "block", "size": 4}, "combine": SHARED},
    "blocks and pinned tokens far away": {
        "feature_map": {"name": "elu"},
        "window": {"name": "block", "size": 4, "first": 2, "within": 8},
        "combine": SHARED,
    },
    "slots": {
        "feature_map": {"name": "identity"},
        "window": NONE,
        "normalizer": NONE,
        "update": {"name": "mesa"},
    },
    "angles": {**DELTA, **GATED, "window": NONE, "position": {"name": "selective_rope", "rank": 4}},
}


@pytest.fixture(autouse=True)
def as_many_cards(request: pytest.FixtureRequest) -> None:
    enough_cards(request)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_kind_of_mixer(size: int, tmp_path: Path) -> None:
    ways = dict.fromkeys(AT_ONCE, True) | dict.fromkeys(IN_TURN, False)
    ended = start(size, spread_jobs.mixers, AT_ONCE | IN_TURN, ways, tmp_path, folder=tmp_path)
    assert ended.codes == [0] * size, ended.said


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_recipe(size: int, tmp_path: Path) -> None:
    """Eight tokens of a process are fewer than most windows, which then reach over several of them."""
    sections = {
        f"{name} {number}": section
        for name, _ in list_recipes()
        for number, section in enumerate(given(compose(name)))
        if section.get("window", {}).get("name") != "full"
    }
    assert len(sections) > 40
    ended = start(size, spread_jobs.mixers, sections, {}, tmp_path, folder=tmp_path)
    assert ended.codes == [0] * size, ended.said


def given(recipe: Recipe) -> list[dict[str, Any]]:
    return variants.given(recipe.mixer, recipe.mixers, recipe.layers)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_softmax(size: int, tmp_path: Path) -> None:
    ended = start(size, spread_jobs.softmax, tiny_llama, tmp_path, folder=tmp_path)
    assert ended.codes == [0] * size, ended.said


def test_compiled_around_attention(tmp_path: Path) -> None:
    ended = start(2, spread_jobs.compiled, tmp_path, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said


def test_layouts_that_nccl_takes(tmp_path: Path) -> None:
    ended = start(2, spread_jobs.layouts, tmp_path, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said


@pytest.mark.slow
def test_every_family(tmp_path: Path) -> None:
    """Those that are not refused by name; of a mask, a window or a bias that was overlooked numbers would tell."""
    ended = start(2, spread_jobs.families, tmp_path, folder=tmp_path)
    assert ended.codes == [0, 0], ended.said
    refused = (tmp_path / "refused-0.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in refused] == ["mistral", "gemma2", "gemma3"]
