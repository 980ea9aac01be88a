"""Triton's kernels run in its interpreter where there is no GPU; it has to be chosen before they are defined.

And the check of an export runs in the test's own process, since starting another takes seconds.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def packed_apart(monkeypatch, tmp_path_factory):
    """Tokenized text of a test is kept for that test alone."""
    from linearize.data import store

    made = []

    def folder():
        if not made:
            made.append(tmp_path_factory.mktemp("cache"))
        return made[0]

    monkeypatch.setattr(store, "cache_dir", folder)


@pytest.fixture(autouse=True)
def check_in_this_process(monkeypatch):
    """Compare an export with its model here; `tests/export/test_verify.py` has it done in a fresh process."""
    from linearize.export import reloading, verify

    monkeypatch.setattr(
        verify, "in_new_process", lambda settings, work: reloading.compare(settings, package=True)
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the kernels' tests in float16 slow on Triton's interpreter; a machine with a GPU runs them."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.nodeid.startswith("tests/kernels/") and re.search(r"(?<!b)float16", item.nodeid):
            item.add_marker("slow")
