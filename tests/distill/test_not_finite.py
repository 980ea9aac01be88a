"""Numbers that are none: told before training, by the model's name, and never written as JSON that nobody reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_llama import byte_tokenizer, tiny_llama

from linearize import cli, distill, plain_json
from linearize.config.schema import Recipe
from linearize.distill import results
from linearize.errors import CheckpointError, NonFiniteLossError, NotFiniteError
from linearize.eval.report import read_run
from linearize.models import sound


@pytest.fixture
def scaled(tmp_path: Path) -> Callable[[str, float], Path]:
    """scaled(fragment, factor): the tiny teacher with some weights multiplied."""

    def make(fragment: str, factor: float) -> Path:
        model = tiny_llama()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if fragment in name:
                    parameter.mul_(factor)
        model.save_pretrained(tmp_path / "scaled")
        byte_tokenizer().save_pretrained(tmp_path / "scaled")
        return tmp_path / "scaled"

    return make


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], object]:
    """Reads JSON as other programs do, which know no NaN."""

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} in JSON")

    return lambda path: json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_eval_of_an_overflowing_model_is_an_error_that_names_it(scaled, tmp_path, capsys) -> None:
    model, suite = scaled("lm_head", 3e38), tmp_path / "small.yaml"
    suite.write_text("about: small\nmeasure:\n  - {task: text, length: 32, windows: 2}\n", encoding="utf-8")
    out = tmp_path / "out"
    assert cli.main(["eval", str(model), "--suite", str(suite), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "not finite" in said.err or "is nan" in said.err
    assert "Traceback" not in said.err and "ppl" not in said.out
    assert not (out / "results.json").exists()


def test_a_run_stops_at_a_teacher_that_overflows(
    scaled, make_recipe: Callable[..., Recipe], tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sound, "LARGEST", math.inf)  # as where it is the activations that are large
    with pytest.raises(
        NotFiniteError, match="teacher, text 'held-out': the log-likelihood of the text is nan"
    ):
        distill.run(str(scaled("lm_head", 3e38)), make_recipe(), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_weights_too_large_to_train_are_told_before_the_folder_is_made(
    scaled, make_recipe: Callable[..., Recipe], tmp_path
) -> None:
    model = scaled("v_proj", 1e21)
    with pytest.raises(
        CheckpointError,
        match=rf"{re.escape(str(model))} reach .*e\+20 in model\.layers\.0\.self_attn\.v_proj",
    ):
        distill.run(str(model), make_recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_first_step_is_not_blamed_on_the_learning_rate(
    scaled, make_recipe: Callable[..., Recipe], tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sound, "LARGEST", math.inf)  # as where it is the activations that are large
    with pytest.raises(NonFiniteLossError) as stopped:
        distill.run(str(scaled("v_proj", 1e21)), make_recipe(), tmp_path / "run")
    text = str(stopped.value)
    assert "step 1" in text and "Nothing has been trained in this stage yet, so no learning rate" in text
    assert "e+20, in model.layers." in text and "stages.transfer.lr" not in text


def test_a_model_that_is_taken_apart_may_give_nan_and_the_run_goes_on(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path, monkeypatch, strict
) -> None:
    original, out = results.perplexity, tmp_path / "run"

    def perplexity(model, *arguments, **options):
        if any(layer.mixer.branch_off for layer in distill.runner.surgery.converted(model)):
            raise NotFiniteError("broken")
        return original(model, *arguments, **options)

    monkeypatch.setattr(results, "perplexity", perplexity)
    summary = distill.run(str(teacher_folder), make_recipe(), out)
    rows = {row["name"]: row["perplexity"]["held-out"] for row in summary.rows}
    assert math.isnan(rows["linear branch off"]) and math.isnan(rows["window off"])
    assert all(math.isfinite(value) for name, value in rows.items() if not name.endswith("off"))
    written = {row["name"]: row["perplexity"]["held-out"] for row in strict(out / "results.json")["rows"]}
    assert written["window off"] == "NaN" and written["teacher"] == rows["teacher"]
    strict(out / "checkpoint" / "linearize.json")
    again = {row["name"]: row["perplexity"]["held-out"] for row in results.Results(out / "results.json").rows}
    assert math.isnan(again["window off"]) and again.keys() == rows.keys()
    assert math.isnan(read_run(out).rows[-2]["perplexity"]["held-out"])
    assert "| window off | nan |" in (out / "report.md").read_text()


def test_plain_json_gives_back_what_it_was_given() -> None:
    value = {"a": [1.5, math.inf, -math.inf, {"b": math.nan}], "c": "text", "d": None, "e": (2, True)}
    text = plain_json.dumps(value)
    assert text == (
        '{"a": [1.5, "Infinity", "-Infinity", {"b": "NaN"}], "c": "text", "d": null, "e": [2, true]}'
    )
    back = plain_json.restored(json.loads(text))
    assert math.isnan(back["a"][3].pop("b")) and back["a"] == [1.5, math.inf, -math.inf, {}]
