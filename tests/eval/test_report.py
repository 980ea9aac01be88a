"""The report of a run folder: whole, cut short, and not a run at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from linearize.errors import RunFolderError
from linearize.eval.report import write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as `linearize run` leaves it, with a last line that a kill cut off."""
    recipe = {
        "description": "Window and linear attention",
        "paper": "LoLCATs",
        "eval": {"length": 1024, "max_windows": 50},
        "stages": {"transfer": {"tokens": 20_000, "lr": 0.01}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    plan = [
        {"layer": layer, "kind": "mixer", "parameters": 1000, "state_bytes": 2000, "kv_bytes_per_token": 10}
        for layer in (0, 2, 4, 6, 8, 10)
    ]
    (tmp_path / "plan.json").write_text(json.dumps({"rows": plan}), encoding="utf-8")
    lines = [
        {
            "stage": "transfer",
            "step": step,
            "tokens": step * 1000,
            "loss": 1 / step,
            "tokens_per_second": 500.0,
            "layers": [0.1 / step, 0.9 / step, 0.2 / step, 0.3 / step, 0.8 / step, 0.05 / step],
        }
        for step in range(1, 21)
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"stage": "tran'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    rows = [
        {
            "name": "teacher",
            "perplexity": {"wikitext2": 21.43},
            "tasks": {"piqa": {"acc": 0.659, "items": 50}},
        },
        {"name": "linear branch off", "perplexity": {"wikitext2": 80.9}},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    environment = {
        "command": "linearize run smollm2-135m lolcats",
        "model": "smollm2-135m",
        "recipe": "lolcats",
        "device": "cpu",
        "resumed": [{"started": "2026-11-24T07:00:00", "command": "linearize run x y --resume"}],
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    }
    (tmp_path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return tmp_path


def test_a_finished_run(run):
    path = write_report(run)
    report = path.read_text(encoding="utf-8")
    assert path == run / "report.md"
    assert report.startswith("# smollm2-135m, linearized by lolcats\n")
    for line in (
        "| command | linearize run smollm2-135m lolcats |",
        "| layers converted | 6 of 6 |",
        "| parameters added | 6,000 |",
        "| state of one sequence | 12,000 bytes, at any length (16-bit model) |",
        "| teacher | 21.43 |",
        "| linear branch off | 80.90 |",
        "| teacher | 65.9 |",
        "| transfer | 20 | 20k | 1.00 | 0.0500 | 500 | 40s |",
        "| torch | 2.13.0 |",
        "| resumed | 1 times, last 2026-11-24T07:00:00 |",
        "lr: 0.01",
    ):
        assert line in report
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", report)
    assert sorted(pictures) == ["layer_loss.png", "loss.png", "perplexity.png"]
    assert all((run / picture).stat().st_size > 5000 for picture in pictures)


def test_the_worst_layers_go_by_the_models_own_numbers(run):
    report = write_report(run).read_text(encoding="utf-8")
    table = report.split("## Layers")[1].split("![")[0]
    assert re.findall(r"^\| (\d+) \|", table, re.MULTILINE) == ["2", "8", "6", "4", "0"]


@pytest.mark.parametrize(
    "missing", ["recipe.yaml", "plan.json", "metrics.jsonl", "results.json", "environment.json"]
)
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_an_unfinished_run_gets_a_report_too(run, missing, how):
    if how == "gone":
        (run / missing).unlink()
    else:
        (run / missing).write_text('{"rows": [', encoding="utf-8")
    report = write_report(run).read_text(encoding="utf-8")
    assert ("**Not finished:**" in report) == (missing == "results.json")


def test_odd_contents_do_not_break_it(run):
    (run / "plan.json").write_text("[1, 2]", encoding="utf-8")
    (run / "results.json").write_text('{"rows": [3, {"name": "x", "perplexity": {"a": NaN}}, {"name": "y"}]}')
    (run / "metrics.jsonl").write_text(
        f'{{"loss": NaN, "tokens": null}}\n7\n{{"loss": {10**400}}}\n{{"layers": [0.0, NaN]}}\n'
    )
    assert "nan" in write_report(run).read_text(encoding="utf-8")


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no run folder at"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"has none of recipe\.yaml, plan\.json"):
        write_report(tmp_path)
