"""Small files: one idea each. A file that outgrows this is two files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 400


def sources() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_no_source_file_is_long():
    sizes = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert sizes
    assert {str(path): lines for path, lines in sizes.items() if lines > LIMIT} == {}


@pytest.mark.parametrize("folder", ["kernels", "eval"])
def test_top_level_folders_that_others_also_name_are_no_packages(folder):
    assert (ROOT / folder).is_dir() and not (ROOT / folder / "__init__.py").exists()
