"""The check of an export in a process of its own, and what becomes of a process that does not come to an end."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest
import tiny

import linearize
from linearize import surgery
from linearize.errors import CheckpointError
from linearize.export import verify
from linearize.export.verify import (
    in_new_process as REAL_PROCESS,
)  # the tests' conftest puts another in its place

SAVING = importlib.import_module("linearize.export.save")
"""The module, whose name in the package is that of its function."""


@pytest.fixture(autouse=True)
def in_a_fresh_process(monkeypatch):
    """Here the process is what is tested."""
    monkeypatch.setattr(verify, "in_new_process", REAL_PROCESS)


def trained(family: str = "llama"):
    model = surgery.convert(tiny.model(family), tiny.LAWCAT, [0, 2])
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model


def test_a_fresh_process_loads_it_with_the_package_and_without(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "linearize"):
        linearize.save(trained("gpt_neox"), tmp_path / "out", check=True)
    assert "checking the export" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_code_that_needs_the_package_is_found_out(tmp_path, monkeypatch):
    check = SAVING.verify

    def needy(model, folder, **options):
        file = folder / "modeling_linearized.py"
        file.write_text(
            file.read_text().replace("import torch\n", "import torch\nimport linearize.mixers\n", 1)
        )
        check(model, folder, **options)

    monkeypatch.setattr(SAVING, "verify", needy)
    with pytest.raises(CheckpointError, match="linearize"):
        linearize.save(trained(), tmp_path / "out", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out-failed"]


def test_a_python_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))
    with pytest.raises(CheckpointError, match="cannot be started"):
        linearize.save(trained(), tmp_path / "out", check=True)


@pytest.mark.parametrize(("last", "ends"), [("exit 3", False), ("kill -9 $$", True)])
def test_a_process_without_a_result(last, ends, tmp_path, monkeypatch, caplog):
    """One that breaks off is an error; one that is killed, as for memory, leaves the export where it belongs."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho no module named torch >&2\n{last}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    if ends:
        linearize.save(trained(), tmp_path / "out", check=True)
        assert "killed by signal 9" in caplog.text
    else:
        with pytest.raises(CheckpointError, match="code 3 before it could: no module named torch"):
            linearize.save(trained(), tmp_path / "out", check=True)
