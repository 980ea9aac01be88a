from __future__ import annotations

import sys

import pytest

from linearize.late import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """An importable module that nobody has imported yet."""
    (tmp_path / "some_late_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "some_late_module"
    sys.modules.pop("some_late_module", None)


def test_it_waits_for_the_import_and_runs_once(module):
    seen = []
    after_import(module, lambda: seen.append(sys.modules[module].value))
    assert seen == [] and module not in sys.modules
    assert __import__(module).value == 1
    __import__(module)
    assert seen == [1]


def test_it_runs_at_once_when_the_module_is_there(module):
    __import__(module)
    seen = []
    after_import(module, lambda: seen.append(True))
    assert seen == [True]
