"""Ctrl-C and SIGTERM at any place of `linearize run`, in processes of their own: a line, a command, an exit code."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from byte_llama import byte_tokenizer, tiny_llama

from linearize import cli, signals

pytestmark = pytest.mark.usefixtures("pictures_unrendered")

SMALL = [
    "data.length=48",
    "eval.length=48",
    "eval.max_windows=2",
    "eval.ablations=false",
    "mixer.feature_map.dim=8",
]
SMALL += ["stages.transfer.tokens=480", "stages.recover.tokens=480"]

PLACES = {
    "load": ("linearize.models", "load_teacher"),
    "teacher": ("linearize.distill.results", "perplexity"),
    "surgery": ("linearize.surgery", "convert"),
    "stage": ("linearize.distill.stages", "prepare"),
    "export": ("linearize.export.save", "model_card"),
    "report": ("linearize.distill.runner", "write_report"),
}
"""Where a run is stopped: a function that is called there, and by which module."""

CHILD = """
import importlib, os, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell has set
name, function, number, *arguments = sys.argv[1:]
from linearize import cli

module = importlib.import_module(name)
original = getattr(module, function)

def stopped(*given, **options):
    setattr(module, function, original)
    os.kill(os.getpid(), int(number))
    time.sleep(0.1)
    return original(*given, **options)

setattr(module, function, stopped)
sys.argv[1:] = arguments
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def child(code: str, *arguments: object, ignoring: bool = False) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, started as a shell starts what runs in the background if asked."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignoring else None,
    )


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} if out.exists() else set()


def stopped_at(place: str, number: int, teacher: Path, out: Path, **options: bool) -> None:
    """Stop a run there, and hold what it says and leaves; then do what it says."""
    command = ["run", teacher, "lolcats", *SMALL, "--out", out]
    done = child(CHILD, *PLACES[place], int(number), *command, **options)
    lines = done.stderr.splitlines()
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr
    assert not [name for name in names(out) if name.startswith(".")]
    if place == "load":
        what = "terminated" if number == signal.SIGTERM else "interrupted"
        assert lines[-1].startswith(f"{what}; resume with: linearize run ") and not out.exists()
        again = lines[-1].partition(": ")[2]
    else:
        assert lines[-2].startswith("aborted; what was saved before is intact. Go on with:")
        again = lines[-1].strip()
    assert again.endswith("--resume")
    assert cli.main(shlex.split(again)[1:]) == 0


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("load", signal.SIGTERM),
        *(
            pytest.param(place, signal.SIGTERM, marks=pytest.mark.slow)
            for place in ("teacher", "surgery", "stage", "export", "report")
        ),
        *(pytest.param(place, signal.SIGINT, marks=pytest.mark.slow) for place in PLACES),
    ],
)
def test_stopped_anywhere(place: str, number: int, teacher: Path, tmp_path: Path) -> None:
    stopped_at(place, number, teacher, tmp_path / "run")


@pytest.mark.slow
def test_started_in_the_background(teacher: Path, tmp_path: Path) -> None:
    """A shell starts background jobs with Ctrl-C ignored; they are ended by SIGTERM."""
    stopped_at("stage", signal.SIGTERM, teacher, tmp_path / "run", ignoring=True)


LEAVING = """
import atexit, os, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)

def late():
    print("leaving", flush=True)
    os.kill(os.getpid(), int(sys.argv.pop()))
    time.sleep(5)
    print("still there", flush=True)

atexit.register(late)  # as torch does
from linearize import cli

def stop(options):
    raise KeyboardInterrupt

import linearize.cli.recipes
linearize.cli.recipes.main = stop
number = sys.argv.pop()
sys.argv[1:] = ["recipes"]
code = cli.main()
sys.argv.append(number)
sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_python_leaves(number: int) -> None:
    done = child(LEAVING, int(number))
    assert done.stdout == "leaving\n"
    assert done.returncode == -number
    assert "Traceback" not in done.stderr


def test_a_command_called_in_this_process_leaves_the_handlers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in signals.STOPPING]
    assert cli.main(["recipes"]) == 0
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


def test_the_exit_codes() -> None:
    assert signals.exit_code(KeyboardInterrupt()) == 130
    assert signals.exit_code(signals.Terminated()) == 143


def raised(job: Callable[[], object]) -> BaseException | None:
    try:
        job()
    except KeyboardInterrupt as stop:
        return stop
    return None


def test_heard_inside_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals.heard():
            assert raised(lambda: os.kill(os.getpid(), signal.SIGTERM)) is None  # its parent chose so
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with signals.heard():
            assert isinstance(raised(lambda: os.kill(os.getpid(), signal.SIGTERM)), signals.Terminated)
            if os.fork() == 0:  # a worker of the process ends without a word
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
