"""The worked example of CONTRIBUTING.md is executed: what it shows is all that a new part takes."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from compositions import SHAPES, Draw, make

from linearize.config import compose
from linearize.config.compose import RECIPES
from linearize.mixers import check
from linearize.mixers.feature_map import FEATURE_MAPS

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def block(language: str) -> str:
    """The first fenced block of that language below the heading of the example."""
    section = TEXT.split("### A part, worked through")[1]
    found = re.search(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def relu2(tmp_path):
    """The example's file, imported as discovery would."""
    path = tmp_path / "relu2.py"
    path.write_text(block("python"))
    spec = importlib.util.spec_from_file_location("relu2_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield
    del sys.modules[spec.name]
    del FEATURE_MAPS._entries["relu2"]


def test_the_part_works_in_three_equal_forms(relu2):
    mixer = {"feature_map": {"name": "relu2", "scale": 2.0}, "window": {"name": "sliding", "size": 5}}
    assert check(mixer) == []
    made = make(mixer, SHAPES["grouped"], torch.float64)
    x = Draw.of(SHAPES["grouped"], 71, torch.float64)
    expected = x.run(made.parallel)
    torch.testing.assert_close(x.run(made.chunked), expected, atol=1e-10, rtol=1e-10)
    state = made.initial_state(2, torch.float64, x.q.device)
    steps = [x[t : t + 1].run(made.step, state=state) for t in range(71)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-10, rtol=1e-10)


def test_its_options_are_checked(relu2):
    (problem,) = check({"feature_map": {"name": "relu2", "scael": 2.0}})
    assert problem == "mixer.feature_map.scael: relu2 has no such option; did you mean 'scale'?"
    (problem,) = check({"feature_map": {"name": "relu2", "scale": -1.0}})
    assert "must be above 0" in problem


def test_the_recipe_composes(relu2, tmp_path, monkeypatch):
    """As a file of somebody's, and by its name where the example says that it lies: in `recipes`."""
    assert "# recipes/relu2.yaml" in block("yaml")
    shutil.copytree(RECIPES, tmp_path / "recipes")
    path = tmp_path / "recipes" / "relu2.yaml"
    path.write_text(block("yaml"))
    recipe = compose(path, [])
    assert recipe.mixer["feature_map"] == {"name": "relu2"}
    assert recipe.mixer["window"]["name"] == "sliding"
    monkeypatch.setattr(sys.modules["linearize.config.compose"], "RECIPES", path.parent)
    assert compose("relu2", []) == recipe
