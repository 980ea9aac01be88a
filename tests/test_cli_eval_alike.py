"""`linearize eval` and the control that costs a training: taken along where it lies, told of where not."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from byte_llama import MIXER, byte_tokenizer, tiny_llama

from linearize import cli, config, export, surgery
from linearize.cli import trained_alike
from linearize.eval.page import same_training

SUITE = "about: small\nmeasure:\n  - {task: text, length: 48, windows: 3}\n"
OVER = "about: small\nmeasure:\n  - {task: text, length: 40, windows: 2, roles: [teacher, student]}\n"


@pytest.fixture
def run(tmp_path) -> Path:
    """What a run of `lolcats` leaves, as far as `eval` looks at it: one of its two stages learns from the text."""
    tiny_llama().save_pretrained(tmp_path / "first")
    byte_tokenizer().save_pretrained(tmp_path / "first")
    folder = tmp_path / "mine"
    model = surgery.convert(tiny_llama(), MIXER)
    base = str(tmp_path / "first")
    export.save(model, folder / "checkpoint", tokenizer=byte_tokenizer(), base=base, recipe={"mixer": MIXER})
    (folder / "recipe.yaml").write_text(config.to_yaml(config.compose("lolcats", ["stages.*.tokens=20k"])))
    (folder / "done.json").write_text("{}")
    (tmp_path / "small.yaml").write_text(SUITE)
    (tmp_path / "over.yaml").write_text(OVER)
    return folder


def measured(run: Path, *options: str) -> list[dict]:
    line = ["eval", str(run), "--suite", str(run.parent / "small.yaml"), *options]
    assert cli.main(line) == 0
    return json.loads((run / "eval" / "results.json").read_text())["rows"]


def test_the_control_is_told_then_made_by_that_command_then_taken_along(run, capsys):
    assert {row["role"] for row in measured(run)} >= {"student", "teacher", "swa_sinks", "untrained swap"}
    said = capsys.readouterr().out
    [line] = [line.strip() for line in said.splitlines() if line.startswith("  linearize run")]
    assert "has not been made" in said and "20,000 tokens of training" in said
    words = shlex.split(line)
    control = Path(words[-1])
    assert words[1] == "run" and words[-2] == "--out" and control == run.with_name("mine-control")
    # what that command leaves: the recipe that it names, and a checkpoint
    control.mkdir()
    (control / "recipe.yaml").write_text(config.to_yaml(config.compose(words[3], words[4:-2])))
    shutil.copytree(run.parent / "first", control / "checkpoint")
    measured(run)
    assert "is not finished" in capsys.readouterr().err
    (control / "done.json").write_text("{}")
    rows = measured(run)
    said = capsys.readouterr()
    assert "mine-control" in {row["role"] for row in rows} and "has not been made" not in said.out
    assert "the teacher trained the same way" in said.err
    assert "No control was trained" not in (run / "eval" / "page.md").read_text()
    before = len(rows)
    assert len(measured(run, "--control", str(control))) == before  # named as well, it stands there once
    assert "mine-control (2)" not in {row["role"] for row in rows}


def test_a_folder_of_another_recipe_is_no_control(run, capsys):
    changes = same_training.without_surgery(trained_alike._recipe(run))
    control = run.with_name("mine-control")
    shutil.copytree(run.parent / "first", control / "checkpoint")
    (control / "done.json").write_text("{}")
    for other in (["data.length=128"], ["stages.recover.lr=1e-5"], ["run.seed=3"]):
        recipe = config.compose(str(run / "recipe.yaml"), [*changes, *other])
        (control / "recipe.yaml").write_text(config.to_yaml(recipe))
        assert trained_alike.found(run) is None
    (control / "recipe.yaml").write_text("stages: [")
    assert trained_alike.found(run) is None
    assert "mine-control" not in {row["role"] for row in measured(run)}
    assert "trained by another recipe" in capsys.readouterr().err


def test_a_recipe_that_learns_from_the_teacher_alone_says_that_it_needs_none(run):
    recipe = config.compose("lolcats", ["~stages.recover"])
    (run / "recipe.yaml").write_text(config.to_yaml(recipe))
    [sentence] = trained_alike.advice(run, "first")
    assert "is the teacher" in sentence


def test_suites_one_after_the_other_and_some_roles_alone(run, capsys):
    both = f"{run.parent / 'small.yaml'},{run.parent / 'over.yaml'}"
    assert cli.main(["eval", str(run), "--suite", both, "--roles", "student,swa_sinks"]) == 0
    rows = json.loads((run / "eval" / "results.json").read_text())["rows"]
    assert {(row["role"], row["length"]) for row in rows} == {
        ("student", 48),
        ("swa_sinks", 48),
        ("student", 40),
    }
    kl = [
        row["value"] for row in rows if row["metric"] == "kl" and row["role"] == "student" and not row["by"]
    ]
    assert len(kl) == 2 and min(kl) > 0.01  # the teacher predicts, though nobody asked for its own rows
    keys = {row["key"] for row in rows}
    assert cli.main(["eval", str(run), "--suite", both]) == 0
    whole = json.loads((run / "eval" / "results.json").read_text())["rows"]
    assert keys < {row["key"] for row in whole}  # they are the same measurements
    assert len({(row["role"], row["length"], row["key"]) for row in whole if not row["by"]}) == len(
        {(row["role"], row["length"]) for row in whole}
    )
    capsys.readouterr()
    for line, reason in (
        (["--roles", "studnet"], "did you mean 'student'?"),
        (["--suite", str(run.parent / "over.yaml"), "--roles", "swa_sinks"], "nothing in suite 'over'"),
        (["--suite", "quick,quick"], "'quick' stands there twice"),
        (["--suite", "quick,all"], "'quick' stands there twice"),
    ):
        assert cli.main(["eval", str(run), *line]) == 2
        assert reason in capsys.readouterr().err
