"""Suites as they ship: every file reads, every task is known, and what a model cannot hold is left out with a word."""

from __future__ import annotations

import logging

import pytest
from byte_llama import TEXT, byte_tokenizer

from linearize.data import Document
from linearize.errors import LinearizeError, RecipeError
from linearize.eval import suite, tasks_known
from linearize.eval.judge import _units
from linearize.eval.measurement import Setting
from linearize.eval.recall.measure import GENERATORS


def test_every_suite_reads_and_knows_its_tasks():
    suites = suite.load("all", faults=tasks_known.problems)
    assert [one.name for one in suites] == suite.names() == ["quick", "standard", "long", "efficiency"]
    measured = {unit.task for one in suites for unit in one.units}
    assert set(GENERATORS) | {"text", "mqar", "decoding", "generation", "prefill", "decode"} == measured
    lengths = {unit.length for one in suites for unit in one.units if unit.task == "passkey"}
    assert lengths >= {512, 1024, 2048, 4096, 8192, 16384, 32768}
    assert all(unit.concerns("swa_sinks") for one in suites for unit in one.units if unit.task in GENERATORS)
    for task in (*GENERATORS, "mqar"):
        lengths = {unit.length for one in suites for unit in one.units if unit.task == task}
        assert lengths >= {1024, 2048, 4096, 8192, 16384, 32768}, task
    only = suite.load("all", ["mqar"])
    assert [one.name for one in only] == ["standard", "long"]
    assert {unit.task for one in only for unit in one.units} == {"mqar"}


def test_an_unknown_suite_or_task_offers_the_nearest(tmp_path):
    with pytest.raises(LinearizeError, match=r"unknown suite 'standart'; did you mean 'standard'\?"):
        suite.load("standart")
    with pytest.raises(LinearizeError, match=r"no task 'pass'; did you mean|no task 'pass'; valid"):
        suite.load("quick", ["pass"])
    file = tmp_path / "mine.yaml"
    for text, reason in (
        ("measure: [{task: text, length: 4}]", "'about'"),
        (
            "about: x\nmeasure: [{task: text, length: many}]",
            "length must be a whole number, or a list of them, got 'many'",
        ),
        ("about: x\nmeasure: [{task: text, length: -4}]", "got -4"),
        ("measre: []\nabout: x", "'measre': did you mean 'measure'"),
        ("about: x\nmeasure: [{task: text, length: 4}]\nroles: [student]", "'roles': valid: about, measure"),
        ("[1]", "it holds a list"),
        ("about: [", "is no YAML"),
        ("", "is no suite"),
        ("[" * 20_000, "is no YAML"),
        ("about: x\nmeasure: {task: text, length: 4}", "measure must be a list of"),
        ("about: x\nmeasure: [text]", r"line 2: an entry is \{task: NAME.* got 'text'"),
        ("about: x\nmeasure:\n- {tsk: text}", "line 3: an entry names a task"),
        ("about: x\nmeasure: [{task: [], length: 4}]", "an entry names a task"),
        ("about: x\nmeasure: [{task: text, length: []}]", r"length must be .* got \[\]"),
        (
            "about: x\nabout: y\nmeasure: [{task: text, length: 4}]",
            "line 2: 'about' stands twice, first in line 1",
        ),
        ("about: x\nmeasure: [{task: text, length: 4, length: 5}]", "'length' stands twice"),
        ("about: x\nmeasure: [{task: text, length: [4, 4]}]", "text at 4 tokens stands there twice"),
        ("about: x\nmeasure: []", "measures nothing"),
        ("about: x\nmeasure: [{task: text, length: 4, roles: {a: b}}]", "roles"),
    ):
        file.write_text(text)
        with pytest.raises(LinearizeError, match=reason):
            suite.load(str(file))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("task: text, length: 48, widnows: 3", r"text has no setting 'widnows'; did you mean 'windows'\?"),
        ("task: text, length: 48, role: teacher", r"no setting 'role'; did you mean 'roles'\?"),
        ("task: text, length: 48, windows: -3", "windows must be a whole number, 0 or more .* got -3"),
        ("task: text, length: 48, windows: many", "windows must be .* got 'many'"),
        ("task: text, length: 48, windows: true", "windows must be .* got True"),
        ("task: text", "length must be a whole number, 2 or more .* got 0"),
        ("task: passkey, length: 400, items: 0", "items must be a whole number, 1 or more .* got 0"),
        ("task: passkey, length: 400, depths: 0", "depths must be"),
        ("task: generation, length: 16, items: 2", "generation needs new_tokens"),
        ("task: prefill, length: 32, batches: 8, repeats: 1", "batches must be a list of whole numbers"),
        ("task: decode, length: 32, batches: [1], repeats: 1", "decode has no setting 'repeats'"),
        ("task: lm_eval, length: 0", "named with --tasks A,B"),
    ],
)
def test_a_setting_that_a_task_does_not_take_is_refused(tmp_path, entry, reason):
    file = tmp_path / "mine.yaml"
    file.write_text(f"about: x\nmeasure: [{{{entry}}}]")
    with pytest.raises(LinearizeError, match=reason):
        suite.load(str(file), faults=tasks_known.problems)


def test_everything_that_is_wrong_with_a_file_is_told_at_once_each_with_its_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "abuot: x\nmeasure:\n  - {task: txt, length: 48, windos: 3}\n"
        "  - {task: passkey, length: 400, items: 0, depth: 3}\n"
        "  - 7\n  - {task: text, length: -4}\n  - {task: text, length: [48, 64], windws: 1, roles: [studnt]}\n"
    )

    def faults(unit):
        return [*tasks_known.problems(unit), *suite.role_problems(unit, [])]

    with pytest.raises(RecipeError) as caught:
        suite.load(str(file), faults=faults)
    told = caught.value.problems
    starts = [
        "'abuot': did you mean 'about'?", "it has no 'about'", "line 3: unknown task 'txt'",
        "line 4: passkey: items must",
        "line 4: passkey has no setting 'depth'", "line 5: an entry is", "line 6: length must be",
        "line 7: text has no setting 'windws'", "line 7: no role 'studnt'",
    ]  # fmt: skip
    assert len(told) == len(starts) and all(map(str.startswith, told, starts)), told


def test_a_merged_key_stands_once(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "about: x\nmeasure:\n  - &one {task: text, length: 48, windows: 2}\n  - {<<: *one, length: 64}\n"
    )
    [mine] = suite.load(str(file), faults=tasks_known.problems)
    assert [(unit.length, unit.settings) for unit in mine.units] == [
        (48, {"windows": 2}),
        (64, {"windows": 2}),
    ]


def test_what_does_not_fit_is_left_out_with_a_word(tmp_path, caplog):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "about: x\nmeasure:\n"
        "  - {task: text, length: [64, 128, 9999999]}\n  - {task: passkey, length: [10, 400], items: 1}\n"
    )
    [mine] = suite.load(str(file))
    setting = Setting(byte_tokenizer(), {"": [Document.plain(TEXT)]}, tmp_path)
    with caplog.at_level(logging.INFO, logger="linearize"):
        kept = [(unit.task, unit.length) for unit in _units(mine, setting, ())]
        setting.longest = 500
        shorter = [(unit.task, unit.length) for unit in _units(mine, setting, ())]
    assert kept == [("text", 64), ("text", 128), ("passkey", 400)]
    assert shorter == [("text", 64), ("text", 128)]
    assert "no passkey at 10 tokens" in caplog.text and "shorter than one window" in caplog.text
    assert "no passkey at 400 tokens: the model has 500 positions" in caplog.text


def test_a_suite_names_controls_that_are_checkpoints_without_knowing_their_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("about: x\nmeasure:\n  - {task: text, length: 64, roles: [teacher, control]}\n")
    [mine] = suite.load(str(file))
    [unit] = mine.units
    assert unit.concerns("teacher") and unit.concerns("run-control") and unit.concerns("control")
    assert not any(unit.concerns(role) for role in ("student", "swa_sinks", "untrained swap", "window off"))
    [[kept]] = [one.units for one in suite.of_roles([mine], ["student", "run-control"])]
    assert kept.roles == ("run-control",)


def test_a_misspelt_role_is_not_measured_of_nobody(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "about: x\nmeasure:\n  - {task: text, length: 64, roles: [student, studnt, demo-control]}\n"
    )
    [[unit]] = [one.units for one in suite.load(str(file))]
    assert suite.role_problems(unit, []) == ["no role 'studnt'; did you mean 'student'?"]
    file.write_text(file.read_text().replace("studnt", "teacher"))
    [[unit]] = [one.units for one in suite.load(str(file))]
    assert suite.role_problems(unit, ["control of mine"]) == []
