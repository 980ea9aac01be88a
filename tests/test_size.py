"""Small files: one idea each. A file that outgrows this is two files."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 400


def sizes() -> dict[str, int]:
    """Lines of each source file; what somebody takes away or moves meanwhile is none."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = {}
    for name in listed:
        with contextlib.suppress(FileNotFoundError):
            found[name] = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    return found


def test_no_source_file_is_long():
    found = sizes()
    assert found
    assert {name: lines for name, lines in found.items() if lines > LIMIT} == {}


@pytest.mark.parametrize("folder", ["kernels", "eval"])
def test_top_level_folders_that_others_also_name_are_no_packages(folder):
    assert (ROOT / folder).is_dir() and not (ROOT / folder / "__init__.py").exists()
