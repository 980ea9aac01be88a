"""Files replaced as a whole, on a disk that refuses everything: the first complaint is the one that is told."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from linearize import storing
from linearize.errors import CheckpointError


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A file system mounted read-only refuses to delete as well, also what was never made."""

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    for name in ("open", "write_text", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(storing, "save_file", lambda tensors, path, metadata: refuse(path))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: storing.write_file(path, "a"),
        lambda path: storing.write_json(path, {}),
        lambda path: storing.write_tensors_file(path, {"a": torch.zeros(1)}),
    ],
)
def test_a_disk_that_refuses(tmp_path, read_only, write):
    with pytest.raises(CheckpointError, match="Read-only file system"):
        write(tmp_path / "file")
