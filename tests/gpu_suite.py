"""A pytest plugin of `scripts/test_gpu.sh`: the suite's order on a GPU, its cards, and what has passed before.

    python tests/gpu_suite.py FOLDER        prints what the results in a folder say, a line a test

`FOLDER/results.tsv` gets a line for each test as it ends: outcome, seconds, name; `FOLDER/failures.txt` the traceback
of what failed and what it had printed, since pytest prints them at its end, and a suite whose time is over has none.
What `FOLDER/before.txt` names is left out, so that a suite that was cut goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

LONGEST = "test_generalized_delta_triton.py::test_equals_the_loop[long_narrow]"
"""Minutes of Triton's compiler, so it begins at once."""
FIRST = (
    "test_stretches", "test_pieces", "test_newest", "test_ahead_newest", "test_compiled_rounds", "test_speculative",
    "test_window_step", "test_window_triton", "test_window_linear",
    "test_conjugate", "test_sse",
    "test_delta_product", "test_joined", "test_generalized_delta_triton", "test_kda_triton", "test_gated_delta_triton",
    "test_taylor", "test_slots_triton", "test_gated_linear_triton", "test_short_conv_triton", "test_distill_triton",
    "tests/kernels/", "test_fused", "test_mesa", "test_learned_start", "test_log_linear", "test_mlstm",
    "test_selective", "test_signed", "test_token_shift", "test_codes", "test_far", "tests/decode/", "tests/",
)  # fmt: skip
"""Parts of names, in the order in which their tests are begun: kernels, what trains and decodes with them, the rest."""
LAST = ("test_contract", "test_random_compositions", "test_nothing_widened", "test_spread")
"""Thousands of tests that need no card."""
PRINTED = 4_000
"""Characters that are kept of what a failed test printed, the last ones."""
MANY = 40
"""Tests of one function that are one line, if more of them have passed, or were skipped."""


def _folder() -> Path:
    return Path(os.environ["LINEARIZE_GPU_SUITE"])


def _take_a_card() -> None:
    """In a process of pytest-xdist: one of the cards, in turn, before anything has looked at them."""
    worker, cards = os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("LINEARIZE_GPU_CARDS", "")
    if worker.startswith("gw") and cards:
        names = cards.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(worker[2:]) % len(names)]


if "LINEARIZE_GPU_SUITE" in os.environ:
    _take_a_card()


def place(name: str, slow: bool) -> int:
    """When a test's turn is, among the numbers of the others."""
    if slow or any(part in name for part in LAST):
        return len(FIRST) + slow
    return next(number for number, part in enumerate(FIRST) if part in name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Most valuable first; each process is given two at once, so beside the longest one stands the least valuable."""
    before = _folder() / "before.txt"
    done = set(before.read_text(encoding="utf-8").splitlines()) if before.is_file() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    kept = [item for item in items if item.nodeid not in done]
    kept.sort(key=lambda item: place(item.nodeid, item.get_closest_marker("slow") is not None))
    longest = [item for item in kept if LONGEST in item.nodeid]
    if longest and len(kept) > 1:
        rest = [item for item in kept if item not in longest]
        kept = [*longest, rest.pop(), *rest]
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Where the reports of all processes come together."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.passed and report.when != "call"):
        return
    with (_folder() / "results.tsv").open("a", encoding="utf-8") as file:
        file.write(f"{report.outcome.upper()}\t{report.duration:.1f}\t{report.nodeid}\n")
    if report.failed:
        with (_folder() / "failures.txt").open("a", encoding="utf-8") as file:
            file.write(failure(report))


def failure(report: pytest.TestReport) -> str:
    """Where a test failed, how, and the end of what it printed."""
    printed = [f"--- {title}\n{text[-PRINTED:]}" for title, text in report.sections if text.strip()]
    title = f"=== {report.nodeid} ({report.when}, {report.duration:.1f} s)"
    return "\n".join([title, report.longreprtext, *printed]) + "\n\n"


def results(folder: Path) -> dict[str, tuple[str, float]]:
    """Test -> outcome and seconds; a later line takes the place of an earlier one."""
    found: dict[str, tuple[str, float]] = {}
    for line in (folder / "results.tsv").read_text(encoding="utf-8").splitlines():
        outcome, seconds, name = line.split("\t", 2)
        found[name] = outcome, float(seconds)
    return found


def table(found: dict[str, tuple[str, float]]) -> Iterator[str]:
    """Counts, what failed, and a line a test; many of one function that have passed are one line."""
    outcomes = [outcome for outcome, _ in found.values()]
    counts = ", ".join(
        f"{outcomes.count(outcome):,} {outcome.lower()}" for outcome in ("PASSED", "FAILED", "SKIPPED")
    )
    yield counts
    yield from (f"FAILED {name}" for name, (outcome, _) in found.items() if outcome == "FAILED")
    for function, names in groupby(sorted(found), key=lambda name: name.partition("[")[0]):
        yield from _lines(function, list(names), found)


def _lines(function: str, names: list[str], found: dict[str, tuple[str, float]]) -> Iterable[str]:
    for outcome in ("FAILED", "PASSED", "SKIPPED"):
        same = [name for name in names if found[name][0] == outcome]
        if len(same) > MANY and outcome != "FAILED":
            seconds = sum(found[name][1] for name in same)
            yield f"{outcome} {len(same):,} of {function} ({seconds:.0f} s)"
        else:
            yield from (f"{outcome} {name} ({found[name][1]:.1f} s)" for name in same)


if __name__ == "__main__":
    print("\n".join(table(results(Path(sys.argv[1])))))
