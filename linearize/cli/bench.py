"""`linearize bench kernels`, `bench recipes`, `bench train` and `bench decode`: speed on this machine's GPU."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING

from linearize import storing
from linearize.console import console, error_console
from linearize.errors import LinearizeError
from linearize.registry import closest

if TYPE_CHECKING:
    from linearize.bench.case import Case
    from linearize.bench.runner import Row


def into_folder(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A benchmark in which what the system refuses about its folder is told."""

    @wraps(command)
    def held(options: argparse.Namespace) -> int:
        with storing.writing(options.out):
            return command(options)

    return held


@into_folder
def kernels(options: argparse.Namespace) -> int:
    """Time the operators, print the table, and write kernels.json, kernels.md and kernels.png.

    Raises:
        LinearizeError: no CUDA device, or an unknown operator.
    """
    from linearize.bench import report
    from linearize.bench.cases import LENGTHS, QUICK_LENGTHS, TOKENS, all_cases
    from linearize.bench.clock import CudaClock
    from linearize.bench.plot import draw
    from linearize.bench.runner import Options, Row, run

    tokens = options.tokens or (TOKENS // 4 if options.quick else TOKENS)
    cases = chosen(all_cases(tokens, QUICK_LENGTHS if options.quick else LENGTHS), options.only)
    clock = CudaClock(spend=60.0 if options.quick else 200.0)
    limits = Options(
        options.peers_at,
        float(options.warm_up),
        options.budget,
        options.compile,
        options.peer_configurations,
    )
    ceilings = clock.ceilings()
    about = report.facts(clock.describe(), ceilings, report.given(options))
    storing.make_folder(options.out)
    progress, rows = Progress(), list[Row]()

    def save(found: list[Row]) -> None:
        progress(found)
        rows[:] = found
        report.write_json(options.out / "kernels.json", about, report.to_json(rows, ceilings))

    try:
        run(cases, clock, limits, save)
    finally:  # stopped from outside, what is there is worth showing
        for line in report.text(rows, ceilings).splitlines() if rows else []:
            console().print(line, markup=False, soft_wrap=True)
        (options.out / "kernels.md").write_text(report.markdown(about, rows, ceilings), encoding="utf-8")
        title = f"{about['device']['name']}, bf16, {tokens:,} tokens x 16 heads x 64, window 64"
        draw(report.to_json(rows, ceilings), options.out / "kernels.png", title)
    console().print(
        f"\nkernels.json, kernels.md and kernels.png in {options.out}", markup=False, soft_wrap=True
    )
    return 0


def chosen(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases of those operators; all of them without names.

    Raises:
        LinearizeError: no such operator; the message has the nearest, or all.
    """
    from linearize.bench.cases import operators

    known = operators(list(cases))
    for name in names:
        if name not in known:
            raise LinearizeError(f"--only {name}: no such operator; {closest(name, known)}")
    return [case for case in cases if not names or case.operator in names]


@into_folder
def recipes(options: argparse.Namespace) -> int:
    """Hand over to `linearize.bench.recipes.main`."""
    from linearize.bench.recipes import main

    return main(options)


@into_folder
def train(options: argparse.Namespace) -> int:
    """Hand over to `linearize.bench.train.main`."""
    from linearize.bench.train import main

    return main(options)


@into_folder
def decode(options: argparse.Namespace) -> int:
    """Hand over to `linearize.bench.decode.main`.

    Raises:
        LinearizeError: this version has no decoding benchmark.
    """
    name = "linearize.bench.decode"
    if importlib.util.find_spec(name) is None:
        raise LinearizeError(
            "this version of linearize has no decoding benchmark; linearize bench kernels is there"
        )
    code: int = importlib.import_module(name).main(options)
    return code


class Progress:
    """A line on standard error for each measurement, on one line of a terminal; nothing where it goes to a file."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.shown = sys.stderr.isatty()
        self.count = 0

    def __call__(self, rows: Sequence[Row]) -> None:
        """Say how far it is."""
        self.count += 1
        if self.shown:
            end = "\r" if self.count < len(rows) else "\n"
            said = f"{self.count}/{len(rows)} measured, {time.monotonic() - self.started:.0f} s"
            error_console().print(said, end=end, markup=False)
