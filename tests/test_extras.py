"""What is told to be installed: by name where pip knows the package, from the checkout where it does not."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from linearize import extras

ROOT = Path(__file__).resolve().parents[1]


def test_installed_and_not(monkeypatch):
    monkeypatch.setattr(extras, "distribution", lambda name: None)
    assert extras.install("serve") == "pip install 'linearize[serve]'"

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    assert extras.install("serve") == f"pip install '{ROOT}[serve]'"


def test_messages_take_it_from_there():
    """And each names a part that there is."""
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for folder in ("linearize", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "pip install 'linearize[" not in text, path
            assert set(re.findall(r'install\("(\w+)"\)', text)) <= known, path
