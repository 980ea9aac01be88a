"""Rows measured elsewhere: joined by scripts/results/join_rows.py, shown by scripts/results/recipes_page.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "results"


def row(recipe, speed, **more):
    kept = {"measured": "train", "shape": "tiny", "recipe": recipe, "way": "bf16", "batch": 1, "length": 8}
    return kept | {"tokens_per_second": speed} | more


@pytest.fixture
def join(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import join_rows

    def joined(before, *cards, options=()):
        files = [tmp_path / f"{card}.json" for card in range(len(cards))]
        for file, rows in zip(files, cards, strict=True):
            file.write_text(json.dumps(rows))
        to = tmp_path / "to.json"
        if before is not None:
            to.write_text(json.dumps(before))
        assert join_rows.main([str(to), *map(str, files), "--commit", "new", *options]) == 0
        return [(x["recipe"], x["tokens_per_second"], x["commit"]) for x in json.loads(to.read_text())]

    joined.main = join_rows.main
    return joined


def test_newer_rows_take_the_place_of_older_ones(join, tmp_path):
    old = [row("a", 1, commit="old"), row("b", 2, commit="old"), row("a", 3, commit="old", batch=2)]
    expected = [("b", 2, "old"), ("a", 3, "old"), ("a", 4, "new")]
    assert join(old, [row("a", 4)]) == expected
    assert join(None, [row("a", 4)]) == expected  # once more: nothing is there twice
    assert join(old, [row("a", 4)], options=["--beside"])[:3] == [
        ("a", 1, "old"),
        ("b", 2, "old"),
        ("a", 3, "old"),
    ]


def test_cards_stand_beside_one_another(join, tmp_path):
    assert join([], [row("a", 1)], [row("a", 2)]) == [("a", 1, "new"), ("a", 2, "new")]
    assert [x["card"] for x in json.loads((tmp_path / "to.json").read_text())] == [0, 1]


def test_what_was_not_measured_takes_nothings_place(join):
    assert join([row("a", 1, commit="old")], [row("a", None), row("b", None)]) == [
        ("a", 1, "old"),
        ("b", None, "new"),
    ]


def test_a_missing_file_is_named(join, tmp_path, capsys):
    assert join.main([str(tmp_path / "to.json"), str(tmp_path / "no.json"), "--commit", "new"]) != 0
    assert "no.json" in capsys.readouterr().err


def test_the_page_is_made_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import recipes_page as page

    text = (page.RESULTS / page.PAGE).read_text(encoding="utf-8")
    rows, profiles = page.read(page.RESULTS / page.ROWS), page.read(page.RESULTS / page.PROFILES)
    assert page.written(text, rows, profiles) == text
    cells = [line.split(" | ")[1] for line in page.training(rows).splitlines()[2:]]
    speeds = [float(cell.strip("*").split()[0].replace(",", "")) for cell in cells if cell.strip()]
    assert [cell.startswith("**") for cell in cells if cell.strip()] == [x < page.LEAST for x in speeds]
    with pytest.raises(ValueError, match="0 places for decoding"):
        page.written(text.replace("<!-- decoding -->", ""), rows, profiles)


def test_rows_of_compiled_blocks_come_first_and_others_say_so(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import recipes_page as page

    def found(recipe, speed, way, **more):
        more = {"shape": page.SHAPE, "way": way, "batch": 64, "length": page.LENGTH, "peak_gib": 1.0} | more
        return row(recipe, speed, commit="c", **more)

    rows = [
        found("teacher", 7.0, "bf16, captured", card=1),
        found("a", 1.0, "bf16, compiled, captured"),
        found("a", 2.0, "bf16, captured"),
        found("b", 3.0, "bf16, captured"),
        found("c", 4.0, "bf16"),
        found("teacher", 8.0, "bf16, captured"),
        found("teacher", 9.0, "bf16, compiled, captured"),
    ]
    lines = [line.split(" | ")[:2] for line in page.training(rows).splitlines()[2:]]
    assert lines == [
        ["| teacher", "9"], ["| teacher", "8 °"], ["| teacher, card 1", "7 °"],
        ["| c", "**4 (c)**"], ["| b", "**3 °**"], ["| a", "**1**"],
    ]  # fmt: skip


def of_cards(processes, speed, **more):
    kept = {"shape": "tiny", "stage": "all_kl", "shard": "none", "length": 8, "batch": 2 * processes}
    found = kept | {"processes": processes, "sequence": 1, "recipe": "lolcats", "peak_gib": 1.0, "note": ""}
    return found | {"tokens_per_second": speed} | more


def test_pages_of_cards_are_made_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import scale_page as page

    rows = json.loads(page.ROWS.read_text(encoding="utf-8"))["rows"]
    for path in (page.PAGE, page.GUIDE):
        text = path.read_text(encoding="utf-8")
        assert page.written(text, rows) == text, f"{path.name}: python scripts/results/scale_page.py"
    with pytest.raises(ValueError, match="no place"):
        page.written("nothing", rows)
    both = [of_cards(1, 100.0), of_cards(2, 190.0), of_cards(2, 150.0, length=16, batch=2)]
    assert "1.90 | reached" in page.scaling(both) and page.scaling(both).count("all weights") == 1
    assert "1.80 | missed by 3 %" in page.scaling([of_cards(1, 100.0), of_cards(2, 180.0)])
    assert "out of memory" in page.beyond(
        [of_cards(2, 9.0, shard="full"), of_cards(1, None, note="out of memory: x")]
    )


def test_rows_of_cards_are_joined(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import scale_page as page

    before = [of_cards(1, 100.0), of_cards(2, 190.0, shard="full")]
    failed, better = of_cards(1, None, note="it said nothing"), of_cards(2, 200.0, shard="full")
    assert page.joined(before, [failed, better]) == [before[0], better]
    assert page.joined([], [failed]) == [failed]


def test_times_one_card_are_of_as_many_tokens_each(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent))
    from scale import scaled

    rows = [
        of_cards(1, 100.0),
        of_cards(2, 190.0),
        of_cards(2, 190.0, batch=8),
        of_cards(2, 70.0, sequence=2, batch=2),
    ]
    assert [row["scaling"] for row in scaled(rows)] == [1.0, 1.9, None, 0.7]


@pytest.mark.slow
def test_rows_of_cards_are_measured(tmp_path):
    """One process and two over gloo, each stage; once more nothing is measured."""
    command = [
        sys.executable,
        str(SCRIPTS.parent / "scale.py"),
        "--shapes",
        "tiny",
        "--device",
        "cpu",
        "--length",
        "64",
    ]
    command += ["--batch", "2", "--seconds", "0.2", "--out", str(tmp_path / "scale.json")]
    given = {"cwd": SCRIPTS.parents[1], "env": {**os.environ, "PYTHONPATH": str(SCRIPTS.parents[1])}}
    for turn in range(2):
        made = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True, **given)
        assert made.stdout.count('"tokens_per_second"') == (0 if turn else 6), made.stdout
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert {(row["stage"], row["processes"]) for row in rows} == {
        (stage, number) for stage in ("transfer", "lora_kl", "all_kl") for number in (1, 2)
    }
    assert all(row["scaling"] > 0 and row["note"] == "" for row in rows)
