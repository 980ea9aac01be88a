"""scripts/results/demo_variants.py: its plan composes, and its page has a line for each stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from linearize.config import compose

RESULTS = Path(__file__).resolve().parents[1] / "scripts" / "results"


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.syspath_prepend(str(RESULTS))
    import demo_variants

    return demo_variants


def test_every_variant_of_the_plan_composes(variants):
    plan = yaml.safe_load((RESULTS / "demo_variants.yaml").read_text(encoding="utf-8"))
    recipes = {name: compose(*variants.lines(plan, one)) for name, one in plan["variants"].items()}
    as_it_is = recipes["the method as it is"]
    method = compose("best_constant")
    assert as_it_is.mixer["update"] == method.mixer["update"] and as_it_is.layers == method.layers
    assert as_it_is.stages["distill"].objective == method.stages["distill"].objective
    assert {recipe.eval.length for recipe in recipes.values()} == {512}


def test_a_calibration_is_shared_by_what_differs_in_stages_alone(variants):
    start = variants._start
    base = compose("demo")
    assert start(base) == start(compose("demo", ["run.workers=1"]))
    assert start(base) == start(compose("demo", ["stages.*.lr=1e-5"]))
    assert start(base) != start(compose("demo", ["mixer.window.size=32"]))
    assert start(base) != start(compose("demo", ["calibrate.tokens=1k"]))


def test_the_page_has_a_line_for_each_stage(variants):
    stages = [
        {"after": "calibrated", "tokens": 2048, "seconds": None, "ppl": 29.5, "kl": 0.14, "same": 80.0},
        {
            "after": "distill",
            "tokens": 10000,
            "seconds": 190.7,
            "ppl": 28.25,
            "kl": 0.12,
            "same": 81.2,
            "off": 28.5,
        },
    ]
    page = variants.table({"rows": {"mine": {"stages": stages}}, "variants": {"mine": "demo stages.*.lr=1"}})
    assert "| mine: calibrated | 29.50 |  | 0.1400 |  | 80 | 2,048 |  |" in page
    assert "| mine: distill | 28.25 | 28.50 | 0.1200 |  | 81 | 10,000 | 191 |" in page
    assert "- mine: demo stages.*.lr=1" in page
