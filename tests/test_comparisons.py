"""The leaderboard and the ablations on a tiny model: rows as they come, judged alike, not made twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from byte_llama import TEXT, byte_tokenizer, tiny_llama

from linearize.config import compose
from linearize.config.budget import check, parse

ROOT = Path(__file__).resolve().parent.parent
SUITE = """about: tiny
measure:
  - {task: text, length: 64, windows: 2, roles: [teacher, student, swa_sinks, linear branch off]}
  - {task: decode, length: 32, batches: [1], steps: 2, cpu_most: 64, roles: [teacher, student]}
"""
RECIPE = """defaults: [lolcats, _self_]
description: tiny
mixer: {feature_map: {name: hedgehog, dim: 8}, window: {name: sliding, size: 8, first: 1}}
calibrate: {tokens: 0}
eval: {length: 64}
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, a text, a suite and a recipe."""
    folder = tmp_path_factory.mktemp("comparison")
    tiny_llama().save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def shared(place: Path) -> list[str]:
    return [
        "--model", str(place / "teacher"), "--suite", str(place / "suite.yaml"),
        "--text", f"river={place / 'text.txt'}", "--out", str(place / "out" / "sheet.json"),
        f"data.source={place / 'text.txt'}", f"data.validation={place / 'text.txt'}",
        "data.length=64", "run.device=cpu",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.job
def test_a_leaderboard_of_one_recipe_and_the_window(
    scripts: None, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import leaderboard

    given = ["--recipes", f"{place / 'tiny.yaml'}", "--minutes", "0.1", "--runs", str(place / "runs")]
    assert leaderboard.main([*given, *shared(place)]) == 0
    found = json.loads((place / "out" / "sheet.json").read_text())
    row = found["rows"]["tiny"]
    assert row["training"]["seconds"] > 0 and row["training"]["tokens"] >= 2 * 64
    assert {"ppl river 64", "kl river 64", "decode bytes 32 x1"} <= set(row["student"])
    assert row["teacher"]["ppl river 64"] > 1 and row["swa_sinks"] and row["linear_off"]
    page = (place / "out" / "sheet.md").read_text()
    assert "**teacher**" in page and "x teacher's, river 64" in page
    assert (place / "out" / "sheet.png").stat().st_size > 1000
    monkeypatch.setattr("subprocess.call", lambda *_, **__: pytest.fail("made again"))
    assert leaderboard.main([*given, *shared(place)]) == 0


@pytest.mark.slow
@pytest.mark.job
def test_what_starts_trains_is_judged_before_it_goes(scripts: None, place: Path) -> None:
    """One training for both tables: the judge's rows of a run's folder, without a checkpoint in it."""
    import leaderboard
    import starts

    suite = place / "brief.yaml"
    suite.write_text(
        SUITE.replace(
            "decode, length: 32, batches: [1], steps: 2, cpu_most: 64", "mqar, length: 64, items: 2"
        )
    )
    given = ["--model", str(place / "teacher"), "--device", "cpu", "--length", "64", "--windows", "2",
             "--train", "1024", "--source", str(place / "text.txt"), "--texts", f"river={place / 'text.txt'}",
             "--tokens", "128", "--calibrated-only", "--judge", str(suite),
             "--runs", str(place / "starts")]  # fmt: skip
    sheet = place / "starts.json"
    assert (
        starts.main([*given, "--out", str(sheet), "--recipes", "swa_sinks", "lolcats mixer.window.size=8"])
        == 0
    )
    row = json.loads(sheet.read_text())["rows"]["lolcats mixer.window.size=8"]
    run = place / "starts" / "lolcats+mixer.window.size=8-calibrated"
    assert not (run / "checkpoint").exists() and (run / "eval" / "results.json").is_file()
    judged = row["judged"]
    # the same windows, once by the run and once by the judge
    assert judged["student"]["ppl river 64"] == pytest.approx(row["after"]["river"], rel=1e-3)
    assert judged["linear_off"]["ppl river 64"] != judged["student"]["ppl river 64"]
    low, high = judged["bounds"]["kl river 64"]
    assert low <= judged["student"]["kl river 64"] <= high and judged["student"]["kl river 64"] > 0
    assert judged["held_bytes"] == row["state_bytes"] and judged["training"]["tokens"] >= 1024
    out = place / "starts-board.json"
    assert leaderboard.main(["--starts", str(sheet), "--out", str(out)]) == 0
    found = json.loads(out.read_text())["rows"]
    assert found["lolcats mixer.window.size=8"]["swa_sinks"] == found["swa_sinks"]["student"]
    assert "seconds" not in found["lolcats mixer.window.size=8"]["training"]


def test_rows_of_starts_on_the_leaderboard(
    scripts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same tokens are called so; intervals, bytes, speed; what was not judged is left out, what failed is said."""
    import leaderboard

    def row(value: float) -> dict[str, object]:
        return {"judged": {
            "student": {"ppl demo 64": value, "kl demo 64": 0.2, "recall mqar 64": 0.25},
            "teacher": {"ppl demo 64": 2.0}, "linear_off": {"ppl demo 64": 2 * value},
            "bounds": {"kl demo 64": [0.1, 0.3], "recall mqar 64": [0.0, 0.5]},
            "held_bytes": 3 * 2**20, "training": {"tokens": 1000000, "seconds": 7351.0, "device": "NVIDIA"},
        }}  # fmt: skip

    settings = {"model": "m", "train": "1000000", "source": "here"}
    about = {"command": "python scripts/starts.py", "date": "today", "commit": "abc", "settings": settings}
    about["teacher"] = {"demo": 2.0}
    first = {"swa_sinks": row(4.0), "gla": row(9.0), "kda": {"swapped": {}}, "softmax": row(2.0)}
    second = {
        "gla": {**row(3.0), "commit": "new"},
        "gla @old": row(8.0),
        "hedgehog": {"after": {"demo": 5.0}, "commit": "abc"},
        "gla stages.uptrain.lr=1e-3": row(5.0),
        "sse": {"judged": {"failed": "it diverged"}},
    }
    for number, rows in enumerate((first, second)):
        (tmp_path / f"{number}.json").write_text(json.dumps({**about, "rows": rows}))
    given = [
        "--starts",
        *(str(tmp_path / f"{n}.json") for n in (0, 1)),
        "--out",
        str(tmp_path / "board.json"),
    ]
    assert leaderboard.main(given) == 1
    page = capsys.readouterr().out.replace(str(tmp_path), "")  # its digits are any digits
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert names == [
        "recipe",
        "**teacher**",
        "**swa_sinks, untrained**",
        "gla",
        "swa_sinks",
        "gla stages.uptrain.lr=1e-3",
        "recipe",
        "hedgehog",
    ]
    assert lines[-1] == "| hedgehog | 5.00 | 2.50 | abc |" and "Of commit new: `gla`." in page
    missing = next(line for line in page.splitlines() if line.startswith("In neither table"))
    assert "`kda`" in missing and "`gla`" not in missing and "`hedgehog`" not in missing
    assert "after 1M tokens" in page and "the same tokens, not the same minutes" in page
    assert not re.search("7,?351|122.5|2:02", page), "seconds of a run that shared its card say nothing"
    assert "0.20 [0.100, 0.300]" in lines[3] and "25.00 [0, 50]" in lines[3] and "| 3.00 |" in lines[3]
    for measured in (("decode", 64, 8192), ("train", 64, 1024)):
        assert f"{leaderboard.speeds(*measured)['gla']:,.0f}" in lines[3]
    assert "- sse: it diverged" in page
    assert (tmp_path / "board.png").stat().st_size > 1000
    (tmp_path / "1.json").write_text(
        json.dumps({**about, "settings": {**settings, "train": "5"}, "rows": second})
    )
    assert leaderboard.main(given) == 2


def test_sheets_of_starts_are_joined_again_and_again(scripts: None) -> None:
    """The newest trained row has the name; what an older one adds stays, with runs and notes of all sheets."""
    from starts_table import join, table

    def sheet(commit: str, rows: dict[str, object], **more: object) -> dict[str, object]:
        about = {"command": f"python {commit}", "date": "today", "commit": commit, "teacher": {"demo": 2.0}}
        settings = {"model": "m", "windows": 1, "length": 64}
        return {**about, "settings": settings, "rows": rows, **more}

    start, other = {"demo": 9.0}, {"demo": 8.0}
    first = sheet("a", {
        "kda": {"swapped": start, "after": {"demo": 7.0}, "note": "diverged"},
        "gla": {"swapped": start, "after": {"demo": 4.0}},
        "sse": {"swapped": start, "note": "still true"},
    }, notes=["of a"])  # fmt: skip
    cut = {"swapped": start, "calibrated": other}
    second = sheet(
        "b",
        {
            "kda": {"swapped": start, "after": {"demo": 3.0}},
            "gla": cut,
            "sse": cut,
            "based": {"after": other},
        },
    )
    once: dict[str, object] = {}
    join(once, [first, second])
    assert set(once["rows"]) == {"kda", "kda @a", "gla", "gla @b", "sse", "based"}
    assert once["rows"]["kda"]["commit"] == "b" and once["rows"]["kda @a"]["note"] == "diverged"
    assert once["rows"]["gla"]["commit"] == "a" and once["rows"]["sse"]["note"] == "still true"
    again: dict[str, object] = {}
    join(again, [once, sheet("c", {"kda": {"swapped": start, "after": {"demo": 3.0}}})])
    assert [run["commit"] for run in again["runs"]] == ["a", "b", "c"] and again["notes"] == ["of a"]
    assert set(again["rows"]) == set(once["rows"]) and again["rows"]["kda"]["commit"] == "c"
    page = table(again)
    assert "| based |" in page and "kda (a): diverged" in page and "of a" in page
    with pytest.raises(SystemExit, match="other settings"):
        join({}, [once, sheet("d", {}, settings={"model": "n"})])


def test_the_committed_ablations_can_all_be_run(scripts: None) -> None:
    import ablate

    plan = ablate.read(ROOT / "scripts" / "ablations.yaml")
    assert (ROOT / plan["suite"]).is_file() and not ablate.variants(plan)["base"][1]
    for name, (recipe, overrides) in ablate.variants(plan).items():
        made = compose(recipe, [*plan["overrides"], *overrides])
        check(made, parse(plan["budget"]))
        assert name == "base" or made != compose(plan["recipe"], plan["overrides"]), name


def test_ablations_go_on_and_say_what_failed(
    scripts: None, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ablate
    import conversions

    plan = place / "plan.yaml"
    plan.write_text(
        f"recipe: {place / 'tiny.yaml'}\nbudget: 640-tokens\nvariants:\n  base: []\n"
        "  other: [mixer.window.size=4]\n  broken: [run.seed=1]\n"
    )
    begun: list[str] = []

    def call(self: conversions.Conversion, command: list[str], environment: dict[str, str]) -> int:
        begun.append(f"{command[0]} {self.name}")
        self.log.write_text("one\n\nthe disk is full\n")
        return int(self.name == "broken")

    def row(folder: Path) -> conversions.Row:
        value = 4.0 if folder.name == "base" else 3.0
        return {
            "training": {"tokens": 640, "seconds": 1.0, "device": "cpu"},
            "student": {"ppl river 64": value, "kl river 64": 0.1},
            "teacher": {"ppl river 64": 2.0},
            "swa_sinks": {"ppl river 64": 8.0},
        }

    monkeypatch.setattr(conversions.Conversion, "_call", call)
    monkeypatch.setattr(conversions, "row", row)
    given = [str(plan), "--runs", str(place / "ablations"), *shared(place)]
    given[given.index("--out") + 1] = str(place / "ablations.json")
    assert ablate.main(given) == 1
    assert sorted(begun) == ["eval base", "eval other", "run base", "run broken", "run other"]
    page = (place / "ablations.md").read_text()
    assert page.index("| other | -25.0 |") < page.index("| base | +0.0 |")
    assert "- broken: one the disk is full" in page and "`mixer.window.size=4`" in page
    begun.clear()
    assert ablate.main(given) == 1 and begun == ["run broken"]
    assert ablate.main([*given, "--budget", "1280-tokens"]) == 2
    assert ablate.main([*given, "--only", "othr"]) == 2
    said = capsys.readouterr().err
    assert "another budget" in said and "did you mean 'other'" in said


def test_names_of_variants_may_have_commas(scripts: None) -> None:
    import ablate
    from sheet import names

    known = list(ablate.read(ROOT / "scripts" / "ablations.yaml")["variants"])
    assert any("," in name for name in known) and names(",".join(known)) == known
