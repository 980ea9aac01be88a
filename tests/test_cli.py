"""The command line without a model: help, listing, and what happens when something is misspelt."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from linearize import cli
from linearize.cli.inspection import grouped, totals
from linearize.cli.parser import build_parser, parse
from linearize.cli.run import default_folder, recipe_name
from linearize.config import compose
from linearize.config.words import describe, ranges
from linearize.errors import LinearizeError
from linearize.surgery.plan import Plan, Row
from linearize.version import __version__

ROOT = Path(__file__).resolve().parent.parent


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # argparse's own help and version
        code = stop.code or 0
    out, err = capsys.readouterr()
    return code, out, err


def test_help_and_version(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "examples:" in out and "inspect" in out
    assert run(capsys)[1] == out == run(capsys, "help")[1]
    assert run(capsys, "help", "bench", "train") == run(capsys, "bench", "train", "--help")
    assert "did you mean 'run'?" in run(capsys, "help", "runn")[2]
    assert run(capsys, "--version")[1].strip() == f"linearize {__version__}"
    for command in ("run", "inspect", "eval", "generate", "recipes"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and out.startswith(f"usage: linearize {command}")


def test_the_help_says_how_every_stage_is_changed(capsys):
    assert "'stages.*.tokens=2M'" in run(capsys, "recipes", "show", "--help")[1]
    code, out, _ = run(capsys, "recipes", "show", "lolcats", "stages.*.tokens=16k")
    assert code == 0 and [stage["tokens"] for stage in yaml.safe_load(out)["stages"].values()] == [16_000] * 2


def test_recipes_lists_and_shows(capsys, tmp_path):
    code, out, _ = run(capsys, "recipes")
    assert run(capsys, "recipes", "list") == (code, out, "")
    assert code == 0 and "\nlolcats " in out and "\nbase " not in out
    code, out, _ = run(capsys, "recipes", "show", "lolcats", "layers.every=4", "stages.transfer.lr=5e-3")
    assert code == 0
    assert yaml.safe_load(out)["layers"] == {"every": 4}
    (tmp_path / "saved.yaml").write_text(out)
    assert compose(tmp_path / "saved.yaml").stages["transfer"].lr == 5e-3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu", "a", "b"], "unknown command 'rnu'; did you mean 'run'?"),
        (["run", "a"], "required: RECIPE"),
        (["run", "a", "lolcats", "--ouut", "x"], "unknown option '--ouut'; did you mean '--out'?"),
        (
            ["run", "a", "lolcats", "stages.transfer.lr"],
            "unexpected argument 'stages.transfer.lr'; overrides",
        ),
        (["run", "a", "lolcat"], "unknown recipe 'lolcat': did you mean 'lolcats'?"),
        (["run", "lolcats", "model"], "MODEL comes first, then RECIPE"),
        (
            ["run", "a", "lolcats", "stages.transfer.lrr=1"],
            "stages.transfer.lrr: unknown key; did you mean 'lr'?",
        ),
        (
            ["run", "a", "lolcats", "--out", "x" * 300],
            "--out: must be the name of a folder, of at most 255 bytes",
        ),
        (["run", "a", "lolcats", "--out", "x\0y"], "--out: must be the name of a folder"),
        (["run", "a", "lolcats", "--out", ""], "--out: must be the name of a folder"),
        (["recipes", "show", "a\0b"], "unknown recipe 'a\\x00b'"),
        (["recipes", "shwo", "x"], "unknown action 'shwo'; did you mean 'show'?"),
        (["recipes", "show", "hedgehg"], "did you mean 'hedgehog'?"),
        (["recipes", "--all"], "unknown option '--all'"),
        (["eval", "x", "--suite", "quik"], "unknown suite 'quik'; did you mean 'quick'?"),
        (["eval", "x", "--only", "txt"], "suite 'quick' has no task 'txt'; did you mean 'text'?"),
        (["eval", "x", "--suite", "no/such.yaml"], "cannot read no/such.yaml"),
        (["eval", "x", "--text", "books"], "must be NAME=FILE"),
        (["eval", "x", "--device", "gpu"], "unknown --device 'gpu'; did you mean 'cpu'?"),
        (["generate", "x"], "one of the arguments --prompt --prompt-file is required"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "must be a number, 0 or more"),
        (["generate", "x", "--prompt", "a", "--seed", str(2**40)], "0 or more and below 2^31, got"),
        (["eval", "x", "--seed", str(2**70)], "0 or more and below 2^31, got"),
        (["generate", "no/such/model", "--prompt", "a"], "no/such/model"),
        (
            ["generate", "x", "--prompt", "a", "--num-beams", "60000"],
            "num_beams must be a whole number from 1",
        ),
        (["generate", "x", "--prompt", "a", "--temperature", "1e-300"], "temperature must be a number from"),
        (["generate", "x", "--prompt", "a", "--top-p", "0.9"], "--top-p 0.9: nothing is sampled at temper"),
        (["generate", "x", "--prompt", "a", "--seed", "1"], "--seed 1: nothing is sampled at temperature 0"),
        (["sample", "x", "--temperature", "0", "--top-k", "5"], "--top-k with --temperature 0"),
        (
            ["sample", "x", "--temperature", "0", "--top-p", "1", "--top-k", "0"],
            "--top-k, --top-p with --temper",
        ),
        (["generate", "x", "--prompt", "a", "--compile", "--no-graph"], "leave out --no-graph or --compile"),
    ],
)
def test_mistakes_exit_with_2_and_a_message(capsys, arguments, expected):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert expected in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "m", "r", "a.b=1", "--out", "x", "c=[0,2]", "~d"],
        ["run", "--out", "x", "m", "r", "a.b=1", "c=[0,2]", "~d"],
        ["run", "m", "r", "a.b=1", "c=[0,2]", "~d", "--out=x"],
        ["run", "m", "--out", "x", "r", "a.b=1", "c=[0,2]", "~d"],
    ],
)
def test_overrides_stand_before_or_after_options(arguments):
    options = parse(build_parser(), arguments)
    assert (options.model, options.recipe, options.out) == ("m", "r", Path("x"))
    assert options.overrides == ["a.b=1", "c=[0,2]", "~d"]


def test_options_that_hold_an_equals_sign_are_no_overrides():
    options = parse(build_parser(), ["eval", "p", "--text", "a=b.txt", "--text", "c=d=e.txt"])
    assert options.text == [("a", "b.txt"), ("c", "d=e.txt")]


@pytest.mark.parametrize(
    ("model", "recipe", "folder"),
    [
        ("smollm2-135m", "lolcats", "runs/smollm2-135m-lolcats"),
        ("org/Model-1.5B", "./mine/my_recipe.yaml", "runs/Model-1.5B-my_recipe"),
        ("/models/tiny/", "demo", "runs/tiny-demo"),
        ("a/b.Q4_1.gguf", "demo", "runs/b.Q4_1-demo"),
    ],
)
def test_the_default_run_folder(model, recipe, folder):
    assert default_folder(model, recipe) == Path(folder)
    assert "/" not in recipe_name(recipe)


def test_run_hands_the_checked_recipe_on(capsys, monkeypatch, tmp_path):
    calls = []

    def fake(model, recipe, out, *, resume, recipe_name, budget):
        calls.append((model, recipe.layers, out, resume, recipe_name, budget))
        return types.SimpleNamespace(
            table=lambda: "the table", checkpoint=out / "checkpoint", report=out / "report.md", folder=out
        )

    monkeypatch.setitem(sys.modules, "linearize.distill", types.SimpleNamespace(run=fake))
    monkeypatch.setattr("linearize.distill", types.SimpleNamespace(run=fake), raising=False)
    code, out, _ = run(capsys, "run", "m", "lolcats", "--out", str(tmp_path), "layers=[1]", "--resume")
    assert code == 0 and "the table" in out and f"linearize generate {shlex.quote(str(tmp_path))}" in out
    assert calls == [("m", [1], tmp_path, True, "lolcats", None)]


def _raise(error: BaseException):
    def command(options):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (LinearizeError("mend it"), 2, "mend it"),
        (KeyboardInterrupt(), 130, "interrupted; resume with: linearize run m demo --out 'a b' --resume"),
        (OSError(28, "No space left on device", "/x"), 2, "the disk is full (/x)"),
        (OSError(errno.EMFILE, "", "/x"), 2, "too many files are open (/x); allow more of them (ulimit -n)"),
        (OSError(errno.EFBIG, ""), 2, "a file grew larger than it may here; allow it"),
        (OSError(errno.EIO, "", "/x"), 2, "the disk answers with an error (/x)"),
        (OSError(errno.EROFS, ""), 2, "the file system is read-only; use another one and try again"),
        (MemoryError(), 2, "out of memory; free some"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 2, "out of memory (DefaultCPU"),
        (
            ImportError("libtorch.so: failed to map segment from shared object"),
            2,
            "out of memory (libtorch.so",
        ),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, expected):
    monkeypatch.setattr("linearize.cli.run.main", _raise(error))
    found, _, err = run(capsys, "run", "m", "demo", "--out", "a b")
    assert found == code and expected in err


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes differ"), OSError(2, "", "/x")])
def test_a_bug_is_not_hidden(monkeypatch, error):
    monkeypatch.setattr("linearize.cli.run.main", _raise(error))
    with pytest.raises(type(error)):
        cli.main(["run", "m", "demo"])


def test_inspect_counts_bytes_and_groups_layers():
    def row(layer, kind, parameters, state):
        return Row(layer, f"layers.{layer}", kind, 9, 3, 64, parameters, state, 768)

    rows = [row(0, "mixer", 10, 7680), row(1, "softmax", 0, 0), row(2, "mixer", 10, 7680)]
    assert [layers for layers, _ in grouped(rows)] == ["0, 2", "1"]
    assert ranges([4, 0, 1, 2]) == "0-2, 4"
    plan = Plan(rows)
    text = "\n".join(totals(plan, 100))
    assert "2 of 3 attention layers" in text and "break-even  10 tokens" in text
    assert "at 100 tokens: 225 KiB before, 90 KiB after, 2.5 times less" in text


def test_a_mixer_in_words():
    from linearize.mixers import normalize

    assert describe(normalize(compose("lolcats").mixer)) == "sliding 64 + hedgehog"
    assert describe(normalize(compose("hedgehog").mixer)) == "hedgehog"
    assert describe(normalize(compose("softmax").mixer)) == "full softmax"
    for name in ("gla", "liger_gla", "kda", "retnet", "gsa_t2r", "radlads_rwkv7", "mamba_in_llama"):
        mixer = normalize(compose(name).mixer)
        words = describe(mixer)
        assert f"{mixer['gate']['name']} gate" in words
        assert (mixer["update"]["name"] in words.split(", ")) == (mixer["update"]["name"] != "additive")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipes"], ["run", "m"]])
def test_the_light_commands_import_nothing_heavy(arguments):
    code = (
        "import sys; from linearize.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets', 'hydra'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "show", "lolcats"]])
def test_a_reader_that_goes_away_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "linearize", *arguments],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "line", ["generate {} --prompt a", "eval {}", "compare {}", "export {} --quantize int8"]
)
def test_paths_that_no_file_can_have(line, capsys):
    name = "x" * 300
    assert cli.main(line.format(name).split()) == 2
    said = capsys.readouterr().err
    assert "too long for a file" in said and len(said) < 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "here", "--prompt", "one", "--prompt", "two"],
        ["generate", "here", "--prompt=one", "--prompt=one"],
        ["run", "here", "lolcats", "--out", "one", "--out", "two"],
        ["select", "here", "lolcats", "--keep", "1", "stages.transfer.lr=1e-2", "--keep", "2"],
        ["bench", "kernels", "--out", "one", "--out", "two"],
    ],
)
def test_an_option_of_one_value_is_not_given_twice(arguments, capsys):
    assert cli.main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "given twice (" in said and "it takes one value" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "CHECKPOINT", "--prompt", "one", "--save-state", "/proc/one.state"],
        ["export", "CHECKPOINT", "--quantize", "int8", "--out", "/proc/one"],
        ["export", "CHECKPOINT", "--layout", "gguf", "--out", "/proc/one"],
    ],
)
def test_a_place_that_nothing_can_be_written_to_is_refused_before_the_work(arguments, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    given = [str(tmp_path) if part == "CHECKPOINT" else part for part in arguments]
    assert cli.main(given) == 2
    assert "/proc/one" in (said := capsys.readouterr().err) and "cannot be written" in said
