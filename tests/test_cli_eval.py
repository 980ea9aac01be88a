"""`linearize eval` on a tiny conversion: every control, rows on disk, resumption, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from byte_llama import MIXER, byte_tokenizer, tiny_llama

from linearize import cli, export, surgery

SUITE = "about: small\nmeasure:\n  - {task: text, length: 48, windows: 3}\n"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(teacher, tmp_path_factory) -> Path:
    """The same model with mixers, as a run exports it."""
    folder = tmp_path_factory.mktemp("runs") / "mine" / "checkpoint"
    model = surgery.convert(tiny_llama(), MIXER)
    export.save(model, folder, tokenizer=byte_tokenizer(), base=str(teacher), recipe={"mixer": MIXER})
    return folder


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Options: a small suite, and a folder for the scores."""
    (tmp_path / "small.yaml").write_text(SUITE)
    return ["--suite", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out")]


def rows(tmp_path) -> list[dict]:
    return json.loads((tmp_path / "out" / "results.json").read_text())["rows"]


def test_a_conversion_stands_beside_its_teacher_and_every_control(converted, files, tmp_path, capsys):
    assert cli.main(["eval", str(converted), *files]) == 0
    said = capsys.readouterr()
    found = rows(tmp_path)
    roles = ["teacher", "student", "linear branch off", "window off", "untrained swap", "swa_sinks"]
    assert list(dict.fromkeys(row["role"] for row in found)) == roles
    assert all(role in said.out for role in roles[2:]) and "mine (student)" in said.out
    assert "small" in said.err and "6 models): about" in said.err
    kl = {row["role"]: row["value"] for row in found if row["metric"] == "kl" and not row["by"]}
    # these mixers are as surgery leaves them, so student and untrained swap are one model
    assert set(kl) == set(roles[1:]) and kl["student"] == pytest.approx(kl["untrained swap"], abs=1e-6)
    apart = {row["role"]: row for row in found if row["metric"] == "nll_difference" and not row["by"]}
    assert apart["untrained swap"]["value"] == pytest.approx(0, abs=1e-6) != apart["window off"]["value"]
    assert all(row["seed"] == 0 and row["version"].startswith("linearize ") for row in found)
    assert all(row["command"].startswith("linearize ") and row["key"] for row in found)

    assert "linear branch off" in (tmp_path / "out" / "page.md").read_text()
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert cli.main(["eval", str(converted), *files]) == 0
    again = capsys.readouterr()
    assert (tmp_path / "out" / "results.json").read_bytes() == before and again.out == said.out
    assert "about" not in again.err  # nothing was left to measure


def test_a_stopped_evaluation_goes_on_behind_its_rows(converted, files, tmp_path, monkeypatch, capsys):
    from linearize.eval import text

    measured = []
    measure = text.Text.measure

    def stops(self, model, call, setting, meter):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(call.entrant.role)
        return measure(self, model, call, setting, meter)

    monkeypatch.setattr(text.Text, "measure", stops)
    assert cli.main(["eval", str(converted), *files]) == 130
    assert "The same command goes on" in capsys.readouterr().err
    kept = rows(tmp_path)
    assert {row["role"] for row in kept} == {"teacher", "student", "linear branch off"}
    monkeypatch.setattr(
        text.Text, "measure", lambda *args: measured.append(args[2].entrant.role) or measure(*args)
    )
    assert cli.main(["eval", str(converted), *files]) == 0
    assert measured[3:] == ["window off", "untrained swap", "swa_sinks"]
    assert rows(tmp_path)[: len(kept)] == kept
    # the differences of the later ones are to the student of the first call
    assert sum(row["metric"] == "nll_difference" and not row["by"] for row in rows(tmp_path)) == 4


def test_an_ordinary_model_has_the_controls_that_apply(teacher, converted, files, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river rose in spring, and the miller moved his corn to the upper house. " * 8)
    assert (
        cli.main(["eval", str(teacher), *files, "--text", f"mine={text}", "--control", str(converted)]) == 0
    )
    found = rows(tmp_path)
    assert list(dict.fromkeys(row["role"] for row in found)) == ["student", "swa_sinks", "mine"]
    assert {row["task"] for row in found} == {"text: mine"}
    assert not any(row["metric"] == "kl" for row in found)
    values = {row["role"]: row["value"] for row in found if row["metric"] == "ppl" and not row["by"]}
    assert values["swa_sinks"] == pytest.approx(
        values["student"], rel=1e-5
    )  # 48 tokens lie within the window


EVERYTHING = """
about: every kind of measurement
measure:
  - {task: mqar, length: 64, items: 2, pairs: 4}
  - {task: passkey, length: 400, items: 4, depths: 2}
  - {task: niah_multivalue, length: 1200, items: 2}
  - {task: decoding, length: 24, roles: [teacher, student]}
  - {task: generation, length: 16, items: 2, new_tokens: 8, roles: [teacher, student]}
  - {task: prefill, length: [32, 64], batches: [1], repeats: 1, roles: [teacher, student]}
  - {task: decode, length: 32, batches: [1], steps: 16, roles: [teacher, student]}
  - {task: passkey, length: 100, items: 2}
"""


def test_every_kind_of_measurement_ends_in_rows_and_tables(converted, files, tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(EVERYTHING)
    assert cli.main(["eval", str(converted), *files]) == 0
    said = capsys.readouterr()
    found = rows(tmp_path)
    assert {row["task"] for row in found} >= {"mqar", "passkey", "niah_multivalue", "decoding", "generation"}
    for role in ("teacher", "student"):
        assert {row["metric"] for row in found if row["role"] == role} >= {
            "exact", "recalled", "choice", "answer_nll", "decode_agreement", "repetition", "milliseconds",
            "cache_bytes",
        }  # fmt: skip
    assert {row["role"] for row in found if row["task"] == "passkey" and row["by"] == "depth"} == {
        "teacher", "student", "linear branch off", "window off", "untrained swap", "swa_sinks",
    }  # fmt: skip
    assert not any(row["role"] == "swa_sinks" for row in found if row["task"] == "prefill")
    assert all(row["value"] == 1 for row in found if row["metric"] == "decode_agreement")
    for words in (
        "recall, % right",
        "what it writes",
        "time and memory",
        "greedy continuations",
        "The teacher itself fails at",
    ):
        assert words in said.out
    # the state of these mixers is larger than so few keys and values; with one it would be a row of its own
    crossed = [row for row in found if row["metric"] == "crossover"]
    assert all(row["role"] == "student" and row["value"] in (32, 64) for row in crossed)
    assert ("student is ahead" in said.out) == bool(crossed)
    assert "no passkey at 100 tokens: passkey: the item alone has" in said.err
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert cli.main(["eval", str(converted), *files]) == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == before and capsys.readouterr().out == said.out


@pytest.mark.usefixtures("own_tasks_once")
def test_tasks_of_lm_eval_stand_beside_the_suite(converted, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    items = [
        {"query": f"The sum of {n} and 1 is", "choices": ["red", "blue"], "gold": n % 2} for n in range(6)
    ]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, items)))
    arguments = [
        "eval",
        str(converted),
        "--out",
        str(tmp_path / "out"),
        "--suite",
        "tasks",
        "--tasks",
        "piqa",
    ]
    assert cli.main([*arguments, "--task-data", str(tmp_path), "--limit", "5"]) == 0
    said = capsys.readouterr()
    found = rows(tmp_path)
    scored = {row["role"]: row for row in found if row["metric"] == "acc"}
    assert len(scored) == 6 and all(row["n"] == 5 and row["low"] < row["high"] for row in scored.values())
    assert {row["suite"] for row in found} == {"tasks"} and {row["task"] for row in found} == {
        "piqa (0-shot)"
    }
    assert all(", lm-eval " in row["version"] for row in found) and "piqa (0-shot)" in said.out
    assert cli.main(arguments[:6]) == 2
    assert "--suite tasks: name them with --tasks A,B" in capsys.readouterr().err


def test_a_task_whose_data_is_not_there_ends_the_call_before_the_suite(converted, files, tmp_path, capsys):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n"
    )
    assert cli.main(["eval", str(converted), *files, "--tasks", "mine", "--include-path", str(tasks)]) == 2
    assert "'mine' cannot be measured" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_cannot_be_measured_is_refused_with_a_remedy(teacher, converted, files, tmp_path, capsys):
    shutil.copytree(teacher, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "wrong.yaml").write_text("about: x\nmeasure: [{length: 4}]\n")
    (tmp_path / "task.yaml").write_text("about: x\nmeasure: [{task: pass_key, length: 4}]\n")
    mistakes = [
        (["--against", str(tmp_path / "nowhere")], "no model"),
        (["--against", str(tmp_path / "other")], "has another tokenizer than"),
        (["--text", f"gone={tmp_path / 'gone.txt'}"], "gone.txt"),
    ]
    suites = [("wrong.yaml", "line 2: an entry names a task"), ("task.yaml", "unknown task 'pass_key'")]
    lines = [([*files, *arguments], expected) for arguments, expected in mistakes]
    for arguments, expected in [
        *lines,
        *((["--suite", str(tmp_path / name)], said) for name, said in suites),
    ]:
        assert cli.main(["eval", str(converted), *arguments]) == 2
        said = capsys.readouterr().err
        assert expected in said and "Traceback" not in said
    assert cli.main(["eval", str(converted), *files, "--text", f"short={tmp_path / 'short.txt'}"]) == 2
    said = capsys.readouterr().err
    assert "shorter than one window of 48" in said and "nothing of small could be measured" in said
