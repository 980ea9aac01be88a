"""Every shipped recipe, end to end on a tiny model: two steps a stage, export, reload, generate; and their tables."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import covering
import pytest
import torch
from byte_llama import TEXT, byte_tokenizer, tiny_llama

import linearize
from linearize import surgery
from linearize.cli.recipes import composition, parts, source
from linearize.config import compose, list_recipes, outline
from linearize.config.compose import RECIPES as FOLDER
from linearize.config.schema import Recipe
from linearize.distill import exporting, run
from linearize.errors import ModelNotFoundError
from linearize.mixers import has_parameters
from linearize.models import resolve

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [name for name, _ in list_recipes()]
FEW = ["liger_gla", pytest.param("gated_deltanet", marks=pytest.mark.slow)]
"""Recipes that every run of the suite takes to the real teacher."""
LENGTH, BATCH, STEPS = 40, 2, 2
PAIR = 600
"""Tokens of a pair of answers, of which some are longer than that in bytes."""
SMALL = {"size": 8, "dim": 8, "rank": 4, "slots": 8, "length": 64}
"""Options of mixer parts that are shrunk to the tiny model, which has two layers: one of each kind in hybrids."""


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers over bytes as an ordinary checkpoint, and a text beside it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors: threads only wait for each other."""
    torch.set_num_threads(1)


def short(recipe: Recipe, length: int, batch: int) -> list[str]:
    """Overrides that take the length of a recipe's stages and of its evaluation, and no more."""
    found = [f"data.length={length}", f"eval.length={length}", "eval.max_windows=2", "eval.ablations=false"]
    found.append(f"calibrate.tokens={length}")
    for name, stage in recipe.stages.items():
        pairs = stage.data is not None and stage.data.template == "preference"
        own = PAIR if pairs else length
        changes = {"tokens": STEPS * batch * own, "batch_size": batch, "log_every": 1}
        changes |= {"data.length": own} if pairs else {"data": "null"}
        found += [f"stages.{name}.{key}={value}" for key, value in changes.items()]
    return [*found, "run.device=cpu"]


def small(recipe: Recipe) -> list[str]:
    """Overrides that shrink a recipe's mixers to the tiny model."""
    found = [
        # what a named mixer differs in stays different
        f"{path}.{part}.{key}={SMALL[key] * (2 if key == 'size' and path != 'mixer' else 1)}"
        for path, mixer in {
            "mixer": recipe.mixer,
            **{f"mixers.{n}": m for n, m in recipe.mixers.items()},
        }.items()
        for part, options in mixer.items()
        for key in options or ()
        if key in SMALL and options[key]
    ]
    use = recipe.layers.get("use", {}) if isinstance(recipe.layers, dict) else {}
    return found + [f"layers.use.{name}.every=2" for name, where in use.items() if "every" in where]


@pytest.mark.usefixtures("pictures_unrendered")
@pytest.mark.parametrize("name", covering.recipes(RECIPES, covering.whole))
def test_end_to_end(name: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[Any] = []
    save = exporting.export.save
    monkeypatch.setattr(
        exporting.export,
        "save",
        lambda model, *rest, **more: exported.append(model) or save(model, *rest, **more),
    )
    shipped, text = compose(name), teacher / "text.txt"
    texts = [f"data.source='{text}'", f"data.validation='{text}'"]
    recipe = compose(name, short(shipped, LENGTH, BATCH) + small(shipped) + texts)
    summary = run(str(teacher), recipe, tmp_path / "run", recipe_name=name)

    rows = {row["name"]: row["perplexity"]["held-out"] for row in summary.rows}
    begun = ["calibrated"] if has_parameters(recipe.mixer) else []
    stages = [f"after {stage}" for stage in recipe.stages]
    assert list(rows) == ["teacher", "swapped, untrained", *begun, *stages]
    assert all(1 < value < float("inf") for value in rows.values())

    model = linearize.load(summary.checkpoint)
    kinds = {layer.mixer.composition for layer in surgery.converted(model)}
    assert len(kinds) == 1 + len(recipe.mixers)
    ids = torch.arange(70)[None] % 256
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, exported[0].eval()(ids).logits, rtol=1e-5, atol=1e-5)
    prompt = {"input_ids": ids[:, :30], "attention_mask": torch.ones(1, 30, dtype=torch.int64)}
    long = {"max_new_tokens": 14, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**prompt, **long, use_cache=True)
    whole = model.generate(**prompt, **long, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(cached.sequences, whole.sequences)


@pytest.mark.job
@pytest.mark.parametrize("name", RECIPES if os.environ.get("LINEARIZE_ALL_RECIPES") else FEW)
def test_on_the_real_teacher(name: str, tmp_path: Path) -> None:
    """Two steps a stage; skipped where the teacher is neither cached nor within reach.

    A full run takes half a minute a recipe, so the suite takes one of them, `make slow` another, and `make recipes`
    takes all.
    """
    try:
        resolve("smollm2-135m")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    recipe = compose(name, short(compose(name), length=128, batch=1))
    summary = run("smollm2-135m", recipe, tmp_path / "run", recipe_name=name)
    first, *rows = (row["perplexity"]["held-out"] for row in summary.rows)
    # the identity equals the teacher, and a window of nearly the whole text can pass it by a little
    assert first < 100 and all(0.9 * first < value < float("inf") for value in rows)


@pytest.mark.parametrize("name", RECIPES)
def test_overrides_that_a_header_offers_are_valid(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    offered = re.findall(r"[\w.]+=\{[^}]*\}|\w+\.[\w.]+=[\w.-]+|~[\w.]+", header)
    compose(name, [override.rstrip(".,") for override in offered])


def test_tables_are_current() -> None:
    """docs/recipes.md and docs/export.md show every recipe with the parts that it has now."""
    spec = importlib.util.spec_from_file_location("recipe_table", ROOT / "scripts" / "recipe_table.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for path, text in script.current().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python scripts/recipe_table.py"
        assert all(f"`{name}`" in text for name in RECIPES)
    assert all(script.differences(name) for name in RECIPES), (
        "a header says where the recipe leaves its paper"
    )


def test_what_the_readme_recommends_is_shipped() -> None:
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Choose a recipe")[1].split("```")[0]
    )
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert len(named) > 10 and named <= set(RECIPES)


def test_parts_in_words() -> None:
    assert parts(outline("swa_sinks")["mixer"]) == ["sliding window 64 (first 4)"]
    assert parts(outline("lizard")["mixer"])[-3:] == [
        "sliding window 128 (first 4, overlap, sinks)",
        "weighted",
        "no RoPE but in the window",
    ]
    assert parts({"feature_map": {"name": "relu"}}) == ["relu", "additive", "running_sum"]
    assert composition(outline("halo")).endswith(
        "1 layer in 4: full window (log of the length, base 362), output gate, no RoPE"
    )
    assert composition(outline("based_alternating")).endswith("; 1 layer in 2: sliding window 64 (first 4)")
    assert composition(outline("transnormer")).endswith("; the first half: block window 64 (first 4)")
    assert "fixed gate (retnet, learned)" in parts(outline("retnet")["mixer"])
    assert composition(outline("xatl")).endswith("; 1 layer in 12 stays softmax")
    assert (
        composition({"mixer": {"window": {"name": "full"}}, "layers": "LSS"})
        == "full window; 2 layers in 3 stay softmax"
    )
    last = {"mixer": {"window": {"name": "full"}}, "layers": {"keep": {"first": 1, "last": 0.3}}}
    assert composition(last) == "full window; the first 1 and the last 30 % of the layers stay softmax"
    assert source(outline("lawcat")["paper"]) == ("Liu et al. 2025", "2509.18467")
    assert source("a note of our own") == ("", "")
    assert all(source(outline(name)["paper"]) != ("", "") for name in RECIPES)
