"""Words of recipes and command lines inside reports and cards: shown, never obeyed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from byte_llama import MIXER, tiny_llama

from linearize import surgery
from linearize.eval import tables
from linearize.eval.report import write_report
from linearize.export.card import model_card
from linearize.markdown import fenced, text

EVIL = [
    "<img src=x onerror=alert(1)>",
    "a | b",
    "one\n\n# two",
    "one\r\n| x | y |",
    "[click](javascript:alert)",
    "![x](http://evil/x.png)",
    "$\\frac$",
    "`code` **bold** _slanted_ ~~gone~~ $x$",
    "```\n<script>",
    "&lt;b&gt;",
    "\u202etxt\u2028<b>",
]


@pytest.mark.parametrize("words", EVIL)
def test_text_is_one_line_without_markup(words: str) -> None:
    shown = text(words)
    assert shown.splitlines() == [shown]
    assert "<" not in shown and ">" not in shown
    bare = shown.replace("\\\\", "")
    for character in "`*|[]~$":
        assert bare.count(character) == bare.count("\\" + character), (character, shown)


@pytest.mark.parametrize(
    "words",
    [
        "smollm2-135m",
        "liger_gla",
        "/tmp/my_model-2",
        "21.43",
        "-0.5",
        "Zhang et al. 2024, arXiv 2410.10254",
        "1e-3 x kl",
    ],
)
def test_ordinary_words_stay_as_they_are(words: str) -> None:
    assert text(words) == words


@pytest.mark.parametrize(
    ("words", "shown"),
    [("# a", "\\# a"), ("- a", "\\- a"), ("1. a", "1\\. a"), ("---", "\\---"), ("_a_b_", "\\_a_b\\_")],
)
def test_nothing_begins_a_block(words: str, shown: str) -> None:
    assert text(words) == shown


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert fenced("a", "yaml") == "```yaml\na\n```"
    assert fenced("a\n````\nb", "") == "`````\na\n````\nb\n`````"


@pytest.mark.parametrize("words", EVIL)
def test_tables_keep_their_columns(words: str) -> None:
    lines = tables.markdown([{"model": words, words: 1.0}]).splitlines()
    assert len(lines) == 3
    assert [line.replace("\\|", "").count("|") for line in lines] == [3, 3, 3]


def hostile(words: str) -> dict:
    return {
        "description": words,
        "paper": words,
        "data": {"source": words, "length": 64},
        "stages": {words: {"objective": {words: 1.0}, "train": [words], "tokens": 1}},
    }


ROWS = {"rows": [{"name": word, "perplexity": {word: 2.0}} for word in EVIL]}


@pytest.mark.parametrize("words", EVIL)
def test_card(words: str) -> None:
    model = surgery.convert(tiny_llama(), MIXER, "all")
    card = model_card(model, base=words, recipe=hostile(words), metrics=ROWS)
    check(card)
    assert len([line for line in card.splitlines() if line.startswith("# ")]) == 1


@pytest.mark.parametrize("words", EVIL)
def test_report(words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(hostile(words)))
    (tmp_path / "results.json").write_text(json.dumps(ROWS))
    facts = {"model": words, "recipe": words, "command": words, "packages": {words: words}, words: [words]}
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": words, "step": 1, "loss": 1.0}) + "\n")
    report = write_report(tmp_path).read_text()
    check(report)
    assert len([line for line in report.splitlines() if line.startswith("# ")]) == 1


def check(document: str) -> None:
    """Outside fences no raw HTML, and every table as wide as its head."""
    fence, width = "", 0
    for line in document.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if len(ticks) >= 3 and (not fence or line == fence):
            fence = "" if fence else ticks
            continue
        if fence:
            continue
        assert "<" not in line, line
        assert re.findall(r"(?<!\\)\]\((.*?)\)", line) in (
            [],
            ["loss.png"],
            ["perplexity.png"],
        )
        cells = line.replace("\\|", "").count("|")
        assert width in (0, cells) or cells == 0, line
        width = cells if line.startswith("|") else 0
    assert not fence


@pytest.mark.parametrize(
    "damage",
    [
        ("results.json", b"[]"),
        ("results.json", b'{"rows": "x"}'),
        ("results.json", b'{"rows": [{"name": "a", "perplexity": 3}]}'),
        ("environment.json", b"[1]"),
        ("recipe.yaml", b"{["),
        (
            "metrics.jsonl",
            b'3\n{"stage": "a", "step": null, "layers": 3}\n\xff\xfe\n{"stage": "a", "layers": ["x"]}\n',
        ),
        ("plan.json", b'{"rows": 3}'),
    ],
    ids=lambda damage: damage[0],
)
def test_a_report_of_a_damaged_folder(damage: tuple[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("description: x")
    (tmp_path / damage[0]).write_bytes(damage[1])
    assert write_report(tmp_path).read_text().startswith("# ")
