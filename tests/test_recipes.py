"""Every shipped recipe, end to end on a tiny model: two steps a stage, export, reload, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import TEXT, byte_tokenizer, tiny_llama

import linearize
from linearize import surgery
from linearize.config import compose, list_recipes
from linearize.config.schema import Recipe
from linearize.distill import run, runner

RECIPES = [name for name, _ in list_recipes()]
LENGTH, BATCH, STEPS = 40, 2, 2
SMALL = {"size": 8, "dim": 8, "rank": 4, "slots": 8, "length": 64}
"""Options of mixer parts that are shrunk to the tiny model."""


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


def smaller(name: str, text: Path) -> list[str]:
    """Overrides that leave a recipe its parts and stages and take its size."""
    recipe = compose(name)
    found = [
        f"data.length={LENGTH}",
        f"data.source='{text}'",
        f"data.validation='{text}'",
        f"eval.length={LENGTH}",
        "eval.max_windows=2",
        "eval.ablations=false",
        "run.device=cpu",
    ]
    for part, options in recipe.mixer.items():
        found += [f"mixer.{part}.{key}={SMALL[key]}" for key in options if key in SMALL and options[key]]
    for stage, settings in recipe.stages.items():
        found += [
            f"stages.{stage}.{key}={value}"
            for key, value in {
                "tokens": STEPS * BATCH * LENGTH,
                "batch_size": BATCH,
                "grad_accum": 1,
                "log_every": 1,
                "data": "null",
            }.items()
        ]
        if settings.lora is not None:
            found.append(f"stages.{stage}.lora.rank=2")
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_end_to_end(name: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[Any] = []
    save = runner.export.save
    monkeypatch.setattr(
        runner.export, "save", lambda model, *rest, **more: exported.append(model) or save(model, *rest, **more)
    )
    recipe: Recipe = compose(name, smaller(name, teacher / "text.txt"))
    summary = run(str(teacher), recipe, tmp_path / "run", recipe_name=name)

    rows = {row["name"]: row["perplexity"]["held-out"] for row in summary.rows}
    assert list(rows) == ["teacher", "swapped, untrained", *(f"after {stage}" for stage in recipe.stages)]
    assert all(1 < value < float("inf") for value in rows.values())

    model = linearize.load(summary.checkpoint)
    assert surgery.converted(model)
    ids = torch.arange(70)[None] % 256
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, exported[0].eval()(ids).logits, rtol=1e-5, atol=1e-5)
    prompt = {"input_ids": ids[:, :30], "attention_mask": torch.ones(1, 30, dtype=torch.int64)}
    long = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**prompt, **long, use_cache=True)
    whole = model.generate(**prompt, **long, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(cached.sequences, whole.sequences)
