"""Sampled text of a test is kept for that test alone; one thread, as sums of tiny matrices would differ with more."""

from __future__ import annotations

import pytest
import torch

from linearize.sample import store


@pytest.fixture(autouse=True)
def sampled_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
