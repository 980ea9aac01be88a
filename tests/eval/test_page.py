"""The page: its verdict follows the numbers, nothing that it shows becomes markup, and every chart has its table."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from judged import judged, score, trained

from linearize import cli
from linearize.config import compose
from linearize.eval import page
from linearize.eval.cast import CONTROLS
from linearize.eval.page import blocks, figures, same_training
from linearize.eval.rows import STUDENT, TEACHER, Scores

HOSTILE = (
    "<script>taken=1</script></script>\"'|`x` <img src=x onerror=window.taken=1> &lt;b&gt; {{ 7*7 }} ]]>-->"
)


class Reader(HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.text += data


def made(*folders: Path) -> page.Page:
    return page.compose(page.read(folders))


def charts(found: page.Page) -> list[blocks.Chart]:
    kinds = (blocks.Lines, blocks.Dots, blocks.Heat, blocks.Bars)
    return [block for section in found.sections for block in section.blocks if isinstance(block, kinds)]


def test_names_and_samples_never_become_markup(tmp_path):
    pytest.importorskip("plotly")
    judged(tmp_path / "a", name=HOSTILE, teacher=HOSTILE[::-1], sample=HOSTILE)
    judged(tmp_path / "b", name="$x$ ~y~ <b>", sample="```\n# heading\n</script>")
    files, missing = page.write(made(tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    assert missing is None and [file.name for file in files] == ["page.md", "page.html"]
    text = (tmp_path / "out" / "page.html").read_text()
    read = Reader(text)
    tags = [tag for tag, _ in read.elements]
    assert tags.count("script") == 3 and "img" not in tags and "b" in tags
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    links = [value or "" for _, attributes in read.elements for name, value in attributes.items()
             if name in ("src", "href")]  # fmt: skip
    assert not [link for link in links if link != "data:," and not re.fullmatch(r"#part\d+", link)]
    shown = " ".join(read.text.split())
    assert shown.count(HOSTILE) > 5 and "``` # heading </script>" in shown and "49" not in shown[:200]
    json_of_charts = text.split('id="charts">', 1)[1].split("</script>", 1)[0]
    assert not set("<>&") & set(json_of_charts) and len(json.loads(json_of_charts)) == len(
        charts(made(tmp_path / "a", tmp_path / "b"))
    )
    words = (tmp_path / "out" / "page.md").read_text()
    outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", words)
    assert not re.search(r"<\w|</", outside) and "# heading" not in outside
    for table in re.findall(r"(?m)(?:^\|.*\n)+", outside):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_every_chart_is_a_valid_figure_and_a_table_of_its_numbers(tmp_path):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    found = made(trained(tmp_path / "first"))
    assert [section.title for section in found.sections] == [
        "Summary", "Quality against context", "Recall by depth and length", "Tasks of lm-eval",
        "Cost against context", "Controls",
        "Training", "What they write", "How it was measured",
    ]  # fmt: skip
    for chart in charts(found):
        graph_objects.Figure(figures.figure(chart))  # raises at what plotly does not know
        assert chart.table().rows
    [tasks] = next(section for section in found.sections if section.title == "Tasks of lm-eval").blocks
    [line] = tasks.rows
    assert line["task"] == "piqa (0-shot)" and line["first"] == "60.0 +-10.0" and len(line) == 9
    heat = next(chart for chart in charts(found) if isinstance(chart, blocks.Heat))
    assert heat.table().rows[0] == {"depth \\ tokens": "0 %", "128": 50, "256": 50}
    layers = next(chart for chart in charts(found) if chart.title.startswith("Transfer"))
    assert layers.table().rows == [
        {"layer of the model": 0, "first, after 200 tokens": 1.0, "first, after 100 tokens": 2.0},
        {"layer of the model": 1, "first, after 200 tokens": 2.0, "first, after 100 tokens": 4.0},
    ]
    crossed = next(b for s in found.sections for b in s.blocks if getattr(b, "title", "").startswith("From"))
    assert {row["first"] for row in crossed.rows} == {256}
    [samples] = [b for s in found.sections for b in s.blocks if isinstance(b, blocks.Samples)]
    assert samples.samples == [
        blocks.Sample("Once", [("big (teacher)", "upon a time"), ("first", "and then")])
    ]


def test_recall_of_one_length_is_one_chart_and_drawn_depths_are_bands(tmp_path):
    def rows(role: str, task: str, length: int, depths: dict[str, tuple[float, int]]) -> list:
        whole = sum(value * n for value, n in depths.values()) / sum(n for _, n in depths.values())
        n = sum(n for _, n in depths.values())
        made = [score(role, task, metric, whole, length=length, n=n) for metric in ("exact", "choice")]
        for depth, (value, n) in depths.items():
            made.append(score(role, task, "exact", value, length=length, n=n, by="depth", bucket=depth))
        return made

    drawn = {"0.05": (1.0, 1), "0.15": (0.0, 3), "0.50": (1.0, 2), "1.00": (0.0, 2)}
    even = {"0.00": (1.0, 2), "0.33": (0.5, 2), "0.67": (0.0, 2), "1.00": (1.0, 2)}
    (tmp_path / "a").mkdir()
    scores = Scores(tmp_path / "a" / "results.json")
    for role in (TEACHER, STUDENT):
        for length in (128, 256):
            scores.add(rows(role, "niah_single_1", length, drawn))
        scores.add(rows(role, "niah_single_2", 128, drawn))
        scores.add(rows(role, "passkey", 128, even))
        scores.add([score(role, "mqar", metric, 0.0, length=512) for metric in ("exact", "choice")])
    found = charts(made(tmp_path / "a"))
    heats = {chart.title: chart for chart in found if isinstance(chart, blocks.Heat)}
    assert set(heats) == {
        f"{name}: {task}" for name in ("mine (teacher)", "mine") for task in ("niah_single_1", "passkey")
    }
    bands = heats["mine: niah_single_1"]
    assert list(bands.rows) == ["0 to 20 %", "20 to 40 %", "40 to 60 %", "60 to 80 %", "80 to 100 %"]
    assert [list(row) for row in bands.values] == [[0.25] * 2, [None] * 2, [1.0] * 2, [None] * 2, [0.0] * 2]
    assert list(heats["mine: passkey"].rows) == ["0 %", "33 %", "67 %", "100 %"]
    [dots] = [chart for chart in found if isinstance(chart, blocks.Dots)]
    assert dots.table().rows == [
        {"task, tokens of context": f"{task}, {length}", "mine (teacher)": value, "mine": value}
        for task, length, value in (("niah_single_2", 128, 37.5), ("passkey", 128, 62.5), ("mqar", 512, 0.0))
    ]
    assert [chart.title for chart in found if isinstance(chart, blocks.Lines)] == [
        "niah_single_1, written right"
    ]


@pytest.mark.parametrize(
    ("beyond", "grade", "words"),
    [
        ((0.2, 0.1, 0.3), "good", "recalls more than a plain window"),
        ((0.2, -0.1, 0.3), "open", "cannot be told apart"),
        ((-0.2, -0.3, -0.1), "bad", "is worse than a plain window at recalling"),
    ],
)
def test_the_headline_follows_the_interval(tmp_path, beyond, grade, words):
    found = made(judged(tmp_path / "a", beyond=beyond))
    assert found.headline.grade == grade and words in found.headline.text


def test_two_conversions_are_compared_token_by_token_where_the_tokens_are_the_same(tmp_path):
    judged(tmp_path / "a", name="good")
    judged(tmp_path / "b", name="less", worse=0.01)
    found = made(tmp_path / "b", tmp_path / "a")
    assert found.headline.grade == "good"
    assert found.headline.text == "good is better than less"
    assert found.findings[0].grade == "good" and "+0.010 nats" in found.findings[0].text
    for file in (tmp_path / "b" / "tokens").iterdir():
        file.unlink()
    found = made(
        tmp_path / "b", tmp_path / "a"
    )  # perplexities of 24.5 and 24.8 with wide intervals say nothing
    assert found.headline.grade == "open" and "intervals overlap" in found.findings[0].text
    names = [row["model"] for row in found.sections[0].blocks[0].rows]
    assert names == ["big (teacher)", "less", "good", "swa_sinks"]


def test_means_of_recall_are_over_the_same_everywhere_and_say_what_they_leave_out(tmp_path):
    for name, worse in (("a", 0.0), ("b", 0.1)):
        folder = judged(tmp_path / name, name=name, worse=worse)
        more = [score(role, task, metric, value, key=f"{role} {task} 128", length=128, model=model)
                for role, model in ((STUDENT, name), (TEACHER, "big"))
                for task, value in (("mqar", 0.2), ("phonebook", 0.4)) for metric in ("exact", "choice")]  # fmt: skip
        Scores(folder / "results.json").add(more)
    found = made(tmp_path / "a", tmp_path / "b")
    of = "mean of 2 measurements: passkey at 128, 256 tokens; not of all models, so left out: mqar, phonebook at 128"
    [said] = [one.text for one in found.findings if "Recall that is written right" in one.text]
    assert said.endswith(f"({of}).")
    table, words = found.sections[0].blocks
    assert f"Recall: {of}." in words.text
    for row in table.rows[1:3]:
        assert f"{row['model']} {row['recall written right, %']} %" in said


@pytest.mark.parametrize(("teacher", "told"), [(21.0, False), (300.0, True)])
def test_the_summary_is_of_texts_that_the_teacher_reaches(tmp_path, teacher, told):
    folder = judged(tmp_path / "a")
    values = {TEACHER: teacher, STUDENT: 17.0} | dict.fromkeys(CONTROLS, 40.0)
    more = [score(role, "text", "ppl", value, length=32768, model="big" if role == TEACHER else "mine")
            for role, value in values.items()]  # fmt: skip
    Scores(folder / "results.json").add(more)
    table, words = made(folder).sections[0].blocks
    student = next(row for row in table.rows if row["model"] == "mine")
    assert (student["perplexity"] == 17.0) is not told
    assert ("in windows of 32,768" in words.text) is not told
    assert ("Longer than the teacher reaches" in words.text and "text at 32,768" in words.text) is told


def test_a_checkpoint_that_several_were_judged_beside_stands_once_and_in_the_verdict(tmp_path):
    for name, worse, more in (("a", 0.0, -0.1), ("b", 0.1, -0.2)):
        folder = judged(tmp_path / name, name=name, worse=worse)
        rows = [score("alike", "text", "ppl", 21.0, low=20.0, high=22.0, model=name),
                score("alike", "text", "nll_difference", more, low=more - 0.01, high=more + 0.01, model=name,
                      against=STUDENT)]  # fmt: skip
        Scores(folder / "results.json").add([replace(row, key=f"alike {name}") for row in rows])
    found = made(tmp_path / "a", tmp_path / "b")
    names = [row["model"] for row in found.sections[0].blocks[0].rows]
    assert names == ["big (teacher)", "a", "b", "swa_sinks", "alike"]
    assert any(
        "a is WORSE than alike over all tokens" in one.text and one.grade == "bad" for one in found.findings
    )
    assert any("-0.200 nats" in one.text and "b is WORSE than alike" in one.text for one in found.findings)
    other = score("alike", "text", "ppl", 25.0, model="b", key="alike b later")
    Scores(tmp_path / "b" / "results.json").add([other])  # another checkpoint of the same name
    names = [row["model"] for row in made(tmp_path / "a", tmp_path / "b").sections[0].blocks[0].rows]
    assert names == ["big (teacher)", "a", "b", "swa_sinks", "a: alike", "b: alike"]


def test_decoding_and_written_text_stand_on_the_page_whatever_the_text_is_called(tmp_path):
    folder = judged(tmp_path / "a")
    more = [score(role, "decoding: books", "decode_agreement", value, length=2000, model=model, key=f"{role} decoding")
            for role, model, value in ((TEACHER, "big", 1.0), (STUDENT, "mine", 0.9995))]  # fmt: skip
    Scores(folder / "results.json").add(more)
    [section] = [one for one in made(folder).sections if one.title == "What they write"]
    lines = {(row["measured"], row["metric"]): row for row in section.blocks[0].rows}
    decoding = lines["decoding: books, 2,000 tokens", "decode agreement"]
    assert decoding["big (teacher)"] == "100.00 %" and decoding["mine"] == "99.95 %"
    assert lines["generation, 16 tokens", "repetition"]["mine"] == "10.00 %"


def test_what_was_measured_unlike_is_said(tmp_path):
    judged(tmp_path / "a", name="one")
    judged(tmp_path / "b", name="one", seed=3)
    found = made(tmp_path / "a", tmp_path / "b")
    assert found.title == "one (1) against one (2)"
    assert any("Not the same items or seeds: text" in finding.text for finding in found.findings)
    assert any("intervals are too narrow: text at 256 from 2;" in finding.text for finding in found.findings)


def test_names_move_no_cursor(tmp_path):
    judged(tmp_path / "a", name="red\x1b[31m\nline", teacher="\x07bell")
    rows = made(tmp_path / "a").sections[0].blocks[0].rows
    assert [row["model"] for row in rows][:2] == ["\ufffdbell (teacher)", "red\ufffd[31m line"]


def test_of_two_measurements_the_later_one_counts(tmp_path):
    judged(tmp_path / "a")
    Scores(tmp_path / "a" / "results.json").add([score(STUDENT, "text", "ppl", 7.5, key="later")])
    found = made(tmp_path / "a")
    row = next(row for row in found.sections[0].blocks[0].rows if row["model"] == "mine")
    assert row["perplexity"] == 7.5 and row["KL to teacher"] is None


def test_scores_that_are_no_numbers_leave_a_page(tmp_path):
    pytest.importorskip("plotly")
    judged(tmp_path / "a")
    values = [score(STUDENT, "text", "ppl", math.inf, key="x"),
              score(STUDENT, "text", "ppl", math.nan, key="x", by="position", bucket="0-64"),
              score(STUDENT, "text", "ppl", 3.0, key="x", by="position", bucket="64-128")]  # fmt: skip
    Scores(tmp_path / "a" / "results.json").add(values)
    judged(tmp_path / "b", name="other")
    assert "other is better than mine" in made(tmp_path / "a", tmp_path / "b").findings[0].text
    page.write(made(tmp_path / "a"), tmp_path / "out")
    text = (tmp_path / "out" / "page.html").read_text()
    json.loads(text.split('id="charts">', 1)[1].split("</script>", 1)[0], parse_constant=pytest.fail)
    assert "| inf |" in (tmp_path / "out" / "page.md").read_text()


def test_the_command_takes_every_kind_of_path_and_names_what_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, folder = trained(tmp_path / "first"), judged(tmp_path / "second", name="other")
    (run / "checkpoint").mkdir()
    for path in (run, run / "eval", run / "checkpoint", run / "eval" / "results.json", run / "results.json"):
        assert cli.main(["compare", str(path), str(folder), "--out", str(tmp_path / "out")]) == 0
        said = capsys.readouterr().out
        assert "first" in said and "other" in said and "recalled" in said and "page.md" in said
        assert "Transfer loss of each layer" in (tmp_path / "out" / "page.md").read_text()
    assert cli.main(["compare", str(folder)]) == 0 and Path("runs/compare-other/page.md").is_file()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "damaged.json").write_text("{")
    for path, expected in (("gone", "no file or folder"), (str(tmp_path), "linearize eval"),
                           ("empty", "has logged nothing yet"), ("damaged.json", "damaged.json")):  # fmt: skip
        capsys.readouterr()
        assert cli.main(["compare", str(folder), path]) == 2
        said = capsys.readouterr().err
        assert expected in said and "Traceback" not in said


def test_without_plotly_the_markdown_is_there_and_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert cli.main(["compare", str(judged(tmp_path / "a")), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "no page.html" in said.err and "pip install 'linearize[page]'" in said.err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["page.md"]


def test_two_students_of_one_file_are_two_subjects(tmp_path, monkeypatch):
    """What was measured of one alone never stands under the other's name."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    import join_scores

    first, second = (
        judged(tmp_path / "first", name="first"),
        judged(tmp_path / "second", name="second", worse=0.3),
    )
    assert join_scores.main([str(tmp_path / "all.json"), str(first), str(second)]) == 0
    whole = Scores(tmp_path / "all.json").rows
    assert {row.model for row in whole if row.role == STUDENT} == {"first"}, (
        "rows of one key are one measurement"
    )

    rows = [replace(row, key=f"second {row.key}") for row in Scores(second / "results.json").rows]
    only = [
        row for row in rows if row.role != TEACHER and not (row.role == STUDENT and row.task == "passkey")
    ]
    Scores(tmp_path / "all.json").add(only)
    one, other = page.read([tmp_path / "all.json"])
    assert (one.name, other.name) == ("first", "second")
    assert {row.model for row in one.rows if row.role == STUDENT} == {"first"}
    assert any(row.task == "passkey" for row in one.rows if row.role == STUDENT)
    assert not any(row.task == "passkey" for row in other.rows if row.role == STUDENT)
    assert [row.value for row in one.rows if row.role == TEACHER] == [
        row.value for row in other.rows if row.role == TEACHER
    ]
    assert "first is better than second" in page.compose([one, other]).headline.text


STAGE = {"tokens": 4000, "batch_size": 1, "lr": 1e-3}
RECIPE = {
    "layers": "all",
    "mixer": compose("demo").mixer,
    "stages": {
        "transfer": {**STAGE, "objective": {"attention_output": 1000.0}, "train": ["mixers"]},
        "distill": {**STAGE, "objective": {"logits_kl": 1.0}, "train": ["all"]},
        "recover": {
            **STAGE,
            "objective": {"logits_kl": 1.0, "next_token": 0.1},
            "train": ["mixers", "lora"],
            "lora": {"rank": 2},
            "lr_mixers": 1e-2,
            "window_dropout": 0.5,
        },
    },
}


def test_a_run_whose_teacher_was_not_trained_the_same_way_says_so(tmp_path):
    folder = trained(tmp_path / "mine")
    assert not [one for one in made(folder).findings if "without surgery" in one.text]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert [one for one in made(folder).findings if "No control was trained as mine was" in one.text]
    again = [replace(row, role="control", key=f"control {row.key}") for row in page.read([folder])[0].rows]
    Scores(folder / "eval" / "results.json").add([row for row in again if row.role == "control"][:3])
    assert not [one for one in made(folder).findings if "without surgery" in one.text]


def test_the_teacher_is_trained_in_the_stages_that_teach_it_something(tmp_path):
    changes = same_training.without_surgery(RECIPE)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"defaults": ["base", "_self_"], **RECIPE}))
    recipe = compose(str(tmp_path / "mine.yaml"), changes)  # is a recipe, and what it says holds together
    assert list(recipe.stages) == ["recover"] and recipe.calibrate.tokens == 0
    assert recipe.mixer["window"]["name"] == "full" and recipe.layers == "all"
    stage = recipe.stages["recover"]
    assert stage.train == ["lora"] and stage.window_dropout == 0 and stage.lr_mixers is None
    only = copy.deepcopy(RECIPE)
    del only["stages"]["recover"]["objective"]["next_token"]  # what is left aims at the teacher, which it is
    assert same_training.without_surgery(only) == []
    assert same_training.without_surgery({"stages": "none"}) == []
