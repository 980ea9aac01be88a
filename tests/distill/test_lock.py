"""One process at a time in a run folder."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interrupted import at_step

from linearize import distill
from linearize.config.schema import Recipe
from linearize.distill import lock
from linearize.distill.lock import LOCK, OWNER, held
from linearize.errors import CheckpointError, LinearizeError, RunFolderError


class Holder:
    """Another process that holds a folder until it is killed."""

    def __init__(self, folder: Path) -> None:
        ready, say = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with held(folder):
                os.write(say, b"held")
                time.sleep(60)
            os._exit(0)
        os.close(say)
        assert os.read(ready, 4) == b"held"
        os.close(ready)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    """Holds tmp_path / "run"."""
    process = Holder(tmp_path / "run")
    yield process
    process.kill()


def test_the_other_is_named_and_a_killed_one_never_blocks(holder: Holder, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with (
        pytest.raises(
            RunFolderError,
            match=re.escape(f"{out} is in use by process {holder.pid} on {os.uname().nodename}"),
        ),
        held(out),
    ):
        raise AssertionError("entered")
    owner = json.loads((out / OWNER).read_text())
    assert owner.keys() == {"pid", "host", "started"} and owner["pid"] == holder.pid
    holder.kill()
    assert (out / OWNER).is_file()  # stale
    with held(out):
        assert json.loads((out / OWNER).read_text())["pid"] == os.getpid()
    assert list(out.iterdir()) == []


def test_folders_made_for_nothing_go_again(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "runs" / "deep"), held(tmp_path / "mine"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with held(tmp_path / "runs" / "deep"):
        (tmp_path / "runs" / "deep" / "a").touch()
    assert [path.name for path in (tmp_path / "runs" / "deep").iterdir()] == ["a"]


def test_a_second_run_in_the_same_process(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(RunFolderError, match=f"process {os.getpid()} "), held(tmp_path):
        pass


@pytest.fixture(params=["kernel", "file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel's locks, and on a file system without them."""
    if request.param == "file":
        monkeypatch.setattr(lock, "_kernel_lock", no_locks)
    return request.param


def no_locks(folder: Path) -> Callable[[], None]:
    (folder / LOCK).touch()
    raise OSError(errno.ENOLCK, "No locks available")


def test_one_of_many_wins(kind: str, tmp_path: Path) -> None:
    start, entered, refused = threading.Barrier(8), [], []
    done = threading.Event()

    def compete() -> None:
        start.wait()
        try:
            with held(tmp_path / "run"):
                entered.append(True)
                done.wait(30)
        except RunFolderError:
            refused.append(True)
            if len(refused) == 7:
                done.set()

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 7)
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_without_kernel_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_kernel_lock", no_locks)
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    owner = {"pid": int(gone.stdout), "host": os.uname().nodename, "started": "then"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    with held(tmp_path):  # its process is gone
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / OWNER).write_text(json.dumps({**owner, "host": "elsewhere"}))
    with (
        pytest.raises(RunFolderError, match=r"on elsewhere \(since then\).*if that process is gone, delete"),
        held(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Callable[..., None]:
        def mkdir(self: Path, *args: object, **options: object) -> None:
            raise OSError(number, os.strerror(number), str(self))

        return mkdir

    monkeypatch.setattr(Path, "mkdir", refuse(errno.EACCES))
    with pytest.raises(RunFolderError, match=r"cannot be created or written.*--out"), held(tmp_path / "run"):
        pass
    monkeypatch.setattr(Path, "mkdir", refuse(errno.ENOSPC))
    with pytest.raises(CheckpointError, match="disk is full"), held(tmp_path / "run"):
        pass


def test_a_run_holds_its_folder(
    teacher_folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first to the last moment; both the plain command and --resume are told who is in it."""
    recipe = make_recipe(tokens=2 * 2 * 64)
    recipe.eval.ablations = False
    out, met = tmp_path / "run", []

    def meanwhile() -> None:
        for resume in (False, True):
            with pytest.raises(LinearizeError) as refused:
                distill.run(str(teacher_folder), recipe, out, resume=resume)
            met.append(str(refused.value))
        assert refused.value.exit_code == 2

    at_step(monkeypatch, "transfer", 1, meanwhile)
    distill.run(str(teacher_folder), recipe, out)
    assert len(met) == 2 and all(f"is in use by process {os.getpid()} on" in message for message in met)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
