"""A folder of the cache is finished, or it is not there."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linearize.errors import CheckpointError
from linearize.models import cache
from linearize.models.cache import PARTIAL, build_once, content_hash, sha256

SLOW_BUILD = """
import sys, time
from pathlib import Path
from linearize.models.cache import build_once
final, log = Path(sys.argv[1]), Path(sys.argv[2])
def build(folder):
    (folder / "half").write_text("half")
    with log.open("a") as file:
        file.write("built\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "whole").write_text("whole")
build_once(final, build)
assert (final / "whole").is_file()
"""


def start(final: Path, log: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(final), str(log), str(seconds)])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def partials(final: Path) -> list[Path]:
    return list(final.parent.glob(f".*{PARTIAL}*"))


def write(folder: Path) -> None:
    (folder / "whole").write_text("whole")


def test_two_processes_build_once(tmp_path):
    final, log = tmp_path / "cache" / "model", tmp_path / "log"
    both = [start(final, log, 0.5) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert log.read_text() == "built\n"
    assert partials(final) == []


def test_what_a_killed_process_left_is_neither_used_nor_kept(tmp_path):
    final, log = tmp_path / "model", tmp_path / "log"
    process = start(final, log, 60)
    wait_for(log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=100)
    assert not final.exists()
    assert len(partials(final)) == 1
    assert build_once(final, write) == final
    assert (final / "whole").is_file() and not (final / "half").exists()
    assert partials(final) == []


def test_a_failed_build_leaves_nothing(tmp_path):
    final = tmp_path / "model"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(final, fail)
    assert not final.exists() and partials(final) == []


def test_a_full_disk_names_the_folder_and_the_remedy(tmp_path):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        CheckpointError,
        match=rf"cache {re.escape(str(tmp_path))}: No space left .*set LINEARIZE_CACHE to a folder",
    ):
        build_once(tmp_path / "model", full)
    assert partials(tmp_path / "model") == []


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the model cache"):
        build_once(tmp_path / "file" / "cache" / "model", write)


def test_a_damaged_folder_is_built_again(tmp_path):
    final = tmp_path / "model"
    final.mkdir()
    (final / "half").write_text("half")
    build_once(final, write, usable=lambda folder: (folder / "whole").is_file())
    assert [path.name for path in final.iterdir()] == ["whole"]


def test_what_is_built_can_be_read_by_others(tmp_path):
    final = build_once(tmp_path / "model", write)
    assert final.stat().st_mode & 0o055 == 0o055
    assert (final / "whole").stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_with_its_time_set_back_is_read_again(tmp_path, monkeypatch, replace):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    file, other = tmp_path / "weights", tmp_path / "other"
    file.write_text("aaaa")
    before, stat = content_hash(file), file.stat()
    time.sleep(0.02)  # longer than a tick of the filesystem's clock
    (other if replace else file).write_text("bbbb")
    os.utime(other if replace else file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if replace:
        other.replace(file)
    after = content_hash(file)
    assert before != after == sha256(file)
    monkeypatch.setattr(cache, "sha256", lambda file: pytest.fail(f"{file} is read again"))
    assert content_hash(file) == after


def test_a_hash_that_cannot_be_remembered_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"some")

    def full(content, stream):
        stream.write("[")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.json, "dump", full)
    assert content_hash(tmp_path / "weights") == sha256(tmp_path / "weights")
    assert list((tmp_path / "cache" / "hashes").iterdir()) == []
