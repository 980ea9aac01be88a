"""Processes that share a device stand still while one of them times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linearize.bench import quiet

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@pytest.fixture
def counting(tmp_path):
    """A process that counts for as long as it may, known in the folder, and where it counts."""
    path = tmp_path / "count"
    path.write_text("")
    child = subprocess.Popen(["sh", "-c", f"while :; do echo >> {path}; sleep 0.01; done"])
    (tmp_path / quiet.FOLDER).mkdir()
    (tmp_path / quiet.FOLDER / str(child.pid)).write_text(quiet._began(child.pid))
    yield path
    child.kill()
    child.wait()


def grows(path, seconds: float) -> bool:
    """Within so long at most."""
    before, end = path.stat().st_size, time.monotonic() + seconds
    while time.monotonic() < end:
        if path.stat().st_size > before:
            return True
        time.sleep(0.02)
    return False


def test_others_stand_still_and_go_on(tmp_path, counting):
    with quiet.known(tmp_path):
        assert grows(counting, 30)
        with quiet.others(tmp_path):
            time.sleep(0.1)  # what it was doing
            assert not grows(counting, 0.5)
        assert grows(counting, 30)
        assert len(list((tmp_path / quiet.FOLDER).iterdir())) == 2
    assert len(list((tmp_path / quiet.FOLDER).iterdir())) == 1


def test_they_go_on_where_whoever_timed_them_is_killed(tmp_path, counting, monkeypatch):
    monkeypatch.setattr(quiet, "MOST", 1)
    with quiet.others(tmp_path):
        assert grows(counting, 30), "nobody had let it go on"


def test_a_number_that_another_process_has_got_is_not_stopped(tmp_path, counting):
    (known,) = (tmp_path / quiet.FOLDER).iterdir()
    known.write_text("1")
    with quiet.others(tmp_path):
        assert grows(counting, 30)
    with quiet.others(None), quiet.others(tmp_path / "none"):
        pass


def test_an_error_lets_them_go_on(tmp_path, counting):
    with pytest.raises(ValueError), quiet.others(tmp_path):
        raise ValueError
    assert grows(counting, 30)


def test_what_a_process_has_begun_stands_still_too(tmp_path):
    path = tmp_path / "count"
    path.write_text("")
    parent = subprocess.Popen(
        ["sh", "-c", f"(while :; do echo >> {path}; sleep 0.01; done) & wait"], start_new_session=True
    )
    try:
        assert grows(path, 30)
        assert len(quiet.follow(tmp_path, [parent.pid])) >= 2
        with quiet.alone(tmp_path):
            time.sleep(0.1)
            assert not grows(path, 0.5)
        assert grows(path, 30)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert quiet.follow(tmp_path, [parent.pid]) == []
    with quiet.alone(None):
        pass


def test_a_command_has_its_turn_alone(tmp_path, counting):
    script = Path(__file__).resolve().parents[1] / "scripts" / "results" / "turns.py"
    asked = [sys.executable, str(script), "alone", str(tmp_path), "30"]
    grown = (
        "import os, sys, time; size = lambda: os.stat(sys.argv[1]).st_size; at = size(); time.sleep(0.5); "
    )
    grown += "sys.exit(size() > at + 1)"
    assert subprocess.run([*asked, sys.executable, "-c", grown, str(counting)]).returncode == 0
    assert grows(counting, 30)
    assert (
        subprocess.run([sys.executable, str(script), "alone", str(tmp_path)], capture_output=True).returncode
        == 2
    )


def test_what_stopped_processes_had_launched_is_waited_for(tmp_path, counting, monkeypatch):
    busy, said = tmp_path / "busy", tmp_path / "said"
    busy.write_text("")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {said}\n[ -e {busy} ] && echo 97 || echo 0\nrm -f {busy}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with quiet.others(tmp_path):
        assert not busy.exists() and len(said.read_text().splitlines()) == 2
        assert said.read_text().splitlines()[0].endswith("-i 3")
    busy.write_text("")
    with quiet.others(tmp_path / "none"):
        assert busy.exists(), "there was nobody to wait for"
