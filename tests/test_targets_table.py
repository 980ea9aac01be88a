"""scripts/results/targets_table.py: what runs came to beside their targets."""

from __future__ import annotations

import json
from math import log
from pathlib import Path

import pytest

from linearize.eval.rows import STUDENT, TEACHER, Score, Scores

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "results"


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import targets_table

    return targets_table


def score(role: str, task: str, metric: str, value: float, length: int, by: str = "", bucket: str = ""):
    names = {"model": "m", "role": role, "suite": "s", "task": task, "metric": metric, "value": value}
    names |= {"n": 9, "length": length, "by": by, "bucket": bucket, "key": f"{task}{metric}{length}"}
    return Score(low=None, high=None, against="", seed=0, version="linearize", command="", **names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "one"
    run.mkdir()
    rows = [("teacher", 20.0), ("calibrated", 30.0), ("after align", 29.0), ("after distill", 21.0)]
    results = {"rows": [{"name": name, "perplexity": {"wikitext2": value}} for name, value in rows]}
    (run / "results.json").write_text(json.dumps(results))
    lines = [
        {"stage": "align", "tokens": 100, "tokens_per_second": 1.0},
        {"stage": "align", "tokens": 200, "tokens_per_second": 100.0},
        {"stage": "align", "tokens": 300, "tokens_per_second": 100.0},
        {"stage": "distill", "tokens": 400, "tokens_per_second": 40.0, "length": 8},
        {"stage": "distill", "tokens": 600, "tokens_per_second": 10.0, "length": 16},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = [
        *(score(role, "passkey", "exact", value, 2048) for role, value in ((TEACHER, 0.8), (STUDENT, 0.4))),
        *(score(role, "text: books", "ppl_hit", x, 1024) for role, x in ((TEACHER, 5.0), (STUDENT, 6.0))),
        score(STUDENT, "text: books", "kl", 0.02, 1024),
        *(
            score(STUDENT, "text: long", "ppl", value, 32768, "position", bucket)
            for bucket, value in (("1024-2048", 30.0), ("16384-32768", 33.0))
        ),
    ]
    (tmp_path / "far" / "one").mkdir(parents=True)
    Scores(tmp_path / "far" / "one" / "results.json").add(judged)
    return run


def test_figures_of_a_run(targets, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([f"best_hybrid={folder}", "--judged", str(folder.parent / "far")]) == 0
    rows = {line.split(" | ")[0].strip("| "): line for line in capsys.readouterr().out.splitlines()}

    def cell(says: str) -> str:
        [line] = [line for name, line in rows.items() if name.startswith(says)]
        return line.split(" | ")[-1].strip("| ")

    assert cell("WikiText-2 perplexity over") == "1.050"  # of 1.04
    assert cell("KL on held-out books") == "**0.020**"
    assert cell("pass keys at 2,048") == "50"
    assert cell("recalled tokens of books") == f"{log(6 / 5):.3f}"
    assert cell("books at 16K to 32K") == "1.100"
    assert cell("seconds of training") == f"**{300 / 100 + 400 / 40 + 200 / 10:.0f}**"
    assert cell("LAMBADA") == "" and cell("pass keys at 4,096") == ""


def test_each_recipe_has_its_own_targets(targets, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets.main([f"best_constant={folder}", "--judged", str(folder.parent / "far")])
    out = capsys.readouterr().out
    assert "**1.050**" in out and "| **50** |" in out  # of 1.12, and of 50 %
