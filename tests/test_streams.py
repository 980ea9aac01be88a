"""Standard output and error that are closed, full, read by nobody, or of another encoding."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linearize.console import messages

ROOT = Path(__file__).resolve().parent.parent
SAYS = """
import sys
from linearize.console import error_console, messages, sound_streams
sound_streams()
import logging
from linearize.progress import Meter
with messages(), Meter("transfer", total=10) as meter:
    for n in range(3000):
        logging.getLogger("linearize").info("step %d", n)
        meter.advance(1)
error_console().print("the last word")
sys.stderr.write("raw")
sys.stderr.flush()
sys.stdout.write("done \\u00e9 \\ud800")
"""


def said(arguments: list[str], shell: str, **environment: str) -> tuple[int, str, str]:
    """Run Python with a shell's redirections; exit code, output, errors."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {shell}', "sh", sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_libraries_are_quiet_before_a_command_imports_them():
    """torchao warns of each of its libraries that is not for this machine, transformers imports it."""
    loud = [logging.getLogger(name) for name in ("torchao", "torchao.float8", "torch.utils._pytree")]
    for log in loud:
        log.setLevel(logging.NOTSET)
    with messages():
        assert not any(log.isEnabledFor(logging.WARNING) for log in loud)
    assert all(log.isEnabledFor(logging.ERROR) for log in loud)


@pytest.mark.parametrize("shell", ["2>/dev/full", "2>&-", "2>/dev/null"])
def test_what_nobody_can_be_told_ends_no_work(shell):
    assert said(["-c", SAYS], shell)[:2] == (0, "done \xe9 \\ud800")


def test_a_reader_of_messages_that_goes_away():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", SAYS], cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, "done \xe9 \\ud800")


def test_messages_arrive_where_somebody_listens():
    code, out, error = said(["-c", SAYS], "", PYTHONIOENCODING="ascii")
    assert (code, out) == (0, "done \\xe9 \\ud800")
    lines = error.splitlines()
    assert lines[0] == "step 0" and lines[-2:] == ["the last word", "raw"]


@pytest.mark.parametrize(
    ("arguments", "shell", "code", "words"),
    [
        (["recipes"], ">&-", 0, ""),
        (["recipes"], ">&- 2>&-", 0, ""),
        (["recipes"], ">/dev/full", 2, "the disk is full; free some space and try again\n"),
        (["recipes", "show", "none_such"], "2>/dev/full", 2, ""),
        (["recipes", "show", "none_such"], "2>&-", 2, ""),
    ],
)
def test_commands(arguments, shell, code, words):
    found, _, error = said(["-m", "linearize", *arguments], shell)
    assert (found, error) == (code, words)
