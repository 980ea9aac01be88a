"""What the tables say in words, and that they fit a terminal of 80 columns."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from linearize.eval.measurement import score
from linearize.eval.rows import Score
from linearize.eval.side_by_side import samples
from linearize.eval.suite import Suite
from linearize.eval.summary import tables, verdicts

ROLES = ["teacher", "student", "linear branch off", "window off", "untrained swap", "swa_sinks"]


def row(role: str, task: str, metric: str, value: float, ends=(None, None), length=512, **place) -> Score:
    made = score(metric, value, ends, 40, **place)
    name = "smollm2-135m" if role == "teacher" else "demo"
    return replace(made, model=name, role=role, suite="quick", task=task, length=length)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((0.1, 0.3), "is better than swa_sinks"), ((-0.3, -0.1), "is WORSE than swa_sinks"),
     ((-0.1, 0.3), "cannot be told apart from swa_sinks"), ((None, None), "cannot be told apart")],
)  # fmt: skip
def test_the_plain_window_is_the_mark(ends, expected):
    one = row("swa_sinks", "text", "nll_difference", 0.2, ends, against="student")
    [said] = verdicts([one])
    assert said.startswith(f"demo {expected}") and "over all tokens (text, 512: +0.200 nats" in said
    [far] = verdicts([replace(one, by="distance", bucket="64-512")])
    assert expected in far and "64 tokens back or more" in far
    assert not list(verdicts([replace(one, by="distance", bucket="64-128"), replace(one, role="window off")]))


def test_what_the_linear_branch_carries_is_told():
    one = row(
        "linear branch off", "text", "nll_difference", 0.002, (-0.001, 0.004), by="distance", bucket="64-512"
    )
    [said] = verdicts([one])
    assert said.startswith("demo cannot be told apart from itself without its linear branch at recalling")


def test_a_teacher_that_fails_is_named():
    rows = [
        row("teacher", "passkey", "exact", 0.2, length=16384),
        row("teacher", "passkey", "exact", 0.9, length=1024),
        row("teacher", "niah_multivalue", "recalled", 0.1, length=4096),
        row("student", "passkey", "exact", 0.0, length=1024),
    ]
    [said] = verdicts(rows)
    assert "fails at passkey at 16,384 (20 %), niah_multivalue at 4,096 (10 %):" in said


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width):
    rows = []
    for number, role in enumerate(ROLES):
        rows += [
            row(role, "text", "ppl", 10.0**number, (9.0, 11.0)),
            row(role, "text", "kl", 3.456, (3.0, 4.0), against="teacher"),
            row(role, "text", "agreement", 0.5, (0.4, 0.6), against="teacher"),
            row(role, "text", "nll_difference", 3.1, (2.86, 3.04), against="student"),
            row(role, "text", "ppl_hit", 1234.5, (1.0, 2.0), by="distance", bucket="64-512"),
            row(role, "text", "nll_difference", 3.1, (2.86, 3.04), by="distance", bucket="64-512"),
            row(role, "niah_multiquery", "recalled", 1.0, (0.6, 1.0), length=16384),
            row(role, "niah_multiquery", "choice", 1.0, (0.6, 1.0), length=16384),
        ]
        for bucket in ("0-64", "64-128"):
            rows += [row(role, "text", "ppl", 28968.0, by="position", bucket=bucket)]
    out = io.StringIO()
    Console(file=out, width=width).print(tables(Suite("quick", "", ()), rows, ROLES))
    said = out.getvalue()
    assert max(map(len, said.splitlines())) <= width
    for whole in (
        "smollm2-135m",
        "student",
        "untrained",
        "28,968",
        "100,000",
        "3.46",
        "+2.86 +3.04",
        "written",
        "picked",
    ):
        assert whole in said
    lines = [line for line in said.splitlines() if "niah_multiquery" in line]
    assert len(lines) == 2 and all(line.count("100") == 6 for line in lines)


def test_what_models_wrote_is_text_and_no_markup(tmp_path):
    (tmp_path / "samples").mkdir()
    for role in ("teacher", "student"):
        written = {"role": role, "prompts": ["Once [bold]", "Two"], "texts": [f"[red]{role}[/red]", "x"]}
        (tmp_path / "samples" / f"{role}.json").write_text(json.dumps(written))
    rows = [
        replace(row(role, "generation", "repetition", 0.1), key=role)
        for role in ("teacher", "student", "gone")
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(samples(rows, tmp_path))
    assert "Once [bold]" in out.getvalue() and "[red]student[/red]" in out.getvalue()
    assert samples(rows[2:], tmp_path) is None and samples([], tmp_path) is None
