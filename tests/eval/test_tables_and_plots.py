"""Numbers as readers want them, tables in both forms, and pictures that are not blank."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from linearize.eval import plots, tables

ROWS = [
    {"name": "teacher", "perplexity": {"wikitext2": 21.43, "books": {"value": 29.14, "nll": 3.37}}},
    {
        "name": "after transfer",
        "perplexity": {"wikitext2": 47.7},
        "tasks": {
            "piqa": {"acc": 0.657, "acc_stderr": 0.01, "items": 100},
            "lambada_openai": {"perplexity": 1234.5},
        },
    },
]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (21.4321, "21.43"),
        (621.44, "621.4"),
        (1975.3, "1,975"),
        (99.999, "100.0"),
        (0.12345, "0.1235"),
        (0.0, "0.0000"),
        (3.1e8, "3.1e+08"),
        (2e-5, "2.0e-05"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (12345, "12,345"),
        (None, ""),
        (True, "True"),
        ("65.7", "65.7"),
    ],
)
def test_number(value, text):
    assert tables.number(value) == text


def test_flat_rows_have_the_same_columns():
    flat = tables.flatten(ROWS)
    assert flat == [
        {
            "model": "teacher",
            "wikitext2 ppl": 21.43,
            "books ppl": 29.14,
            "piqa acc %": None,
            "lambada_openai ppl": None,
        },
        {
            "model": "after transfer",
            "wikitext2 ppl": 47.7,
            "books ppl": None,
            "piqa acc %": "65.7",
            "lambada_openai ppl": 1234.5,
        },
    ]
    assert "lambada_openai ppl" not in tables.flatten(ROWS, metrics=["acc"])[0]


def test_sections_part_perplexities_and_tasks():
    found = tables.sections([*ROWS, {"name": "nothing yet"}])
    assert list(found) == ["Perplexity", "Tasks"]
    assert [row["model"] for row in found["Perplexity"]] == ["teacher", "after transfer"]
    assert found["Tasks"] == [{"model": "after transfer", "piqa acc %": "65.7", "lambada_openai ppl": 1234.5}]
    assert list(tables.sections(ROWS[:1])) == ["Perplexity"]
    assert tables.sections([]) == {}


def test_markdown():
    assert tables.markdown([]) == ""
    assert tables.markdown(tables.flatten(ROWS, metrics=["acc"])).splitlines() == [
        "| model | wikitext2 ppl | books ppl | piqa acc % |",
        "| --- | ---: | ---: | ---: |",
        "| teacher | 21.43 | 29.14 |  |",
        "| after transfer | 47.70 |  | 65.7 |",
    ]
    assert tables.markdown([{"a": "x|y"}]).endswith("| x\\|y |")


@pytest.mark.parametrize(("width", "parts"), [(160, 1), (60, 3), (40, 7)])
def test_no_number_is_cut_off_where_the_console_is_narrow(width, parts):
    rows = [
        {"task": f"arc_{n} (0-shot)", "metric": "acc", **{f"model {m}": f"{n}{m}.25 +-4{n}.5" for m in range(6)},
         "items": 1000 + n}
        for n in range(2)
    ]  # fmt: skip
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.Fitted(rows, title="Tasks"))
    said = console.file.getvalue()
    assert max(map(len, said.splitlines())) <= width and said.count("Tasks") == 1
    for row in rows:
        for name, value in row.items():
            assert name in ("task", "metric") or tables.number(value) in said
    assert said.count("arc_0") == parts


def test_rich_table():
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(tables.Fitted(tables.flatten(ROWS), title="Results"))
    text = console.export_text()
    assert "Results" in text and "after transfer" in text and "65.7" in text and "1,23" in text


def test_results_fit_a_terminal_of_80_columns():
    tasks = {
        name: {"acc": 0.657, "acc_norm": 0.65} for name in ("piqa", "arc_easy", "arc_challenge", "winogrande")
    }
    rows = [
        {"name": "swapped, untrained", "perplexity": {"wikitext2": 1975.3, "books": 971.2}, "tasks": tasks}
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.results(rows, metrics=["acc"]))
    text = console.export_text()
    assert text.count("65.7") == 4 and "1,975" in text and "…" not in text


def metrics(lines: int = 60, layers: int = 6) -> list[dict]:
    transfer = [
        {
            "stage": "transfer",
            "step": step,
            "tokens": step * 1000,
            "loss": 1 / step,
            "layers": [(layer + 1) / step for layer in range(layers)],
        }
        for step in range(1, lines)
    ]
    return [*transfer, {"stage": "recover", "step": 1, "tokens": 900, "loss": 3.1}]


def check_picture(path: Path | None) -> None:
    assert path is not None
    pixels = imread(path)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 600
    colored = abs(pixels[..., 0] - pixels[..., 2]) > 0.2
    assert colored.sum() > 100, "nothing but text and axes was drawn"


@pytest.mark.parametrize("lines", [2, 3, 60])
def test_layer_loss(tmp_path, lines):
    check_picture(plots.layer_loss(metrics(lines), tmp_path / "layers.png"))


@pytest.mark.parametrize("lines", [2, 60])
def test_loss_curves(tmp_path, lines):
    check_picture(plots.loss_curves(metrics(lines), tmp_path / "loss.png"))


def test_loss_curves_survive_what_is_no_number(tmp_path):
    lines = [
        *metrics(10),
        {"stage": "recover", "step": 2, "tokens": 1000, "loss": math.nan},
        {"stage": "recover"},
    ]
    check_picture(plots.loss_curves(lines, tmp_path / "loss.png"))


@pytest.mark.parametrize("worst", [30.0, 1e9, math.inf])
def test_perplexity_bars(tmp_path, worst):
    rows = [
        *ROWS,
        {"name": "untrained", "perplexity": {"wikitext2": worst, "books": worst}},
        {"name": "no numbers"},
    ]
    check_picture(plots.perplexity_bars(rows, tmp_path / "bars.png"))


def test_nothing_to_plot(tmp_path):
    assert plots.layer_loss([{"stage": "a", "loss": 1.0}], tmp_path / "a.png") is None
    assert plots.loss_curves([], tmp_path / "b.png") is None
    assert plots.perplexity_bars([{"name": "teacher"}], tmp_path / "c.png") is None
    assert not list(tmp_path.iterdir())
