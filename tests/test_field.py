"""docs/recipes.md on the rest of the field: what it names is there, composes, and was trained for a million tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from linearize.config import compose, list_recipes
from linearize.mixers import check

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECIPES = {name for name, _ in list_recipes()}


SECTION = (DOCS / "recipes.md").read_text(encoding="utf-8")
SECTION = SECTION.split("## Mixers from the rest of the field\n")[1].split("\n## ")[0]


def rows() -> dict[str, list[str]]:
    """First cell -> the others."""
    lines = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if line.startswith("| ")][2:]
    return {first: rest for first, *rest in lines}


ROWS = rows()
UNTRAINED = set(re.findall(r"`(\w+)`", re.findall(r"Not yet trained there: ([^.]*)\.", SECTION)[0]))
"""Recipes of which the docs say that they have no row."""


@pytest.mark.parametrize("mixer", ROWS, ids=lambda x: x.split(",")[0])
def test_it_has_a_paper_a_file_a_recipe_tests_and_a_row(mixer):
    parts, lines, tests = ROWS[mixer]
    papers = re.findall(r"\[([\d.]+)\]\(https://arxiv.org/abs/\1\)", mixer)
    assert papers
    files = [DOCS / one for cell in (parts, tests) for one in re.findall(r"\]\(([^)]+)\)", cell)]
    assert len(files) > 1 and [one for one in files if not one.is_file()] == []
    sources = " ".join(one.read_text(encoding="utf-8") for one in files)
    assert [paper for paper in papers if paper not in sources] == []
    assert "float64" in sources
    trained = json.loads((DOCS / "results" / "mixers-h200.json").read_text(encoding="utf-8"))["rows"]
    board = json.loads((DOCS / "results" / "leaderboard.json").read_text(encoding="utf-8"))
    names = re.findall(r"`([^`]+)`", lines)
    for name, *overrides in (line.split() for line in names):
        recipe = compose(name, overrides)
        assert check(recipe.mixer) == []
        if not overrides:
            if name in UNTRAINED:
                assert "after" not in trained.get(name, {}) and name not in board["rows"]
                continue
            assert trained[name]["after"].keys() >= {"demo", "wikitext2"}
            assert name in board["rows"] or name in board["unjudged"]
    assert RECIPES & set(names)


def test_what_is_called_untrained_is_a_recipe_of_the_table():
    named = {name for _, lines, _ in ROWS.values() for name in re.findall(r"`([^`]+)`", lines)}
    assert named & RECIPES >= UNTRAINED
