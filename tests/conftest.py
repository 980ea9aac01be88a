"""Triton's kernels run in its interpreter where there is no GPU; it has to be chosen before they are defined.

And the check of an export runs in the test's own process, since starting another takes seconds.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import quick_interpreter
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter.install()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave what collecting made out of the garbage collector's sight.

    Every training ends in a whole collection; half a second each, over the objects of thousands of tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test and its fixtures draw follows from no test before it: workers take tests in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """And what a module's tests have imported, once they are over."""
    try:
        return (yield)
    finally:
        if nextitem is None or nextitem.path != item.path:
            gc.collect()
            gc.freeze()


@pytest.fixture(autouse=True)
def packed_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenized text of a test is kept for that test alone; also behind the test's own `monkeypatch.undo()`."""
    from linearize.data import store

    made = []

    def folder():
        if not made:
            made.append(tmp_path_factory.mktemp("cache"))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "cache_dir", folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def check_in_this_process() -> Iterator[None]:
    """Compare an export with its model here; `tests/export/test_verify_process.py` has it done in a fresh process.

    For the whole session, so that it holds for what modules make once and behind a test's own `monkeypatch.undo()`.
    """
    from linearize.export import reloading, verify

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            verify, "in_new_process", lambda settings, work: reloading.compare(settings, package=True)
        )
        yield


@pytest.fixture(scope="module")
def pictures_unrendered() -> Iterator[None]:
    """Draw a report's figures and do not render them, for tests of runs whose subject is not the report."""
    from linearize.eval import plots

    def save(figure: object, path: Path) -> Path:
        path.write_bytes(b"")
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", save)
        yield


@pytest.fixture(scope="session")
def own_tasks_once() -> Iterator[None]:
    """Let lm-eval read the fourteen thousand tasks that it ships once, and a folder that is given each time."""
    tasks = pytest.importorskip("lm_eval.tasks")
    index = pytest.importorskip("lm_eval.tasks._index").TaskIndex
    shipped, build = Path(tasks.__file__).parent, index.build
    read = functools.cache(lambda: build([shipped]))

    def merged(paths: Iterable[Path], **options: bool) -> dict[str, object]:
        found: dict[str, object] = {}
        for path in paths:
            found |= read() if path == shipped and not options else build([path], **options)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "build", staticmethod(merged))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the kernels' tests in float16 slow on Triton's interpreter; a machine with a GPU runs them."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.nodeid.startswith("tests/kernels/") and re.search(r"(?<!b)float16", item.nodeid):
            item.add_marker("slow")
