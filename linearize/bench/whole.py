"""Rows of whole-model benchmarks: one JSON file that grows row by row, a table of each kind, and how rows fail."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from linearize import storing
from linearize.bench import quiet, report
from linearize.bench.runner import LOST
from linearize.bench.subjects import TEACHER
from linearize.errors import LinearizeError
from linearize.eval import tables
from linearize.markdown import text as escaped

Row = dict[str, Any]
KEY = ("measured", "shape", "recipe", "stage", "way", "batch", "length")
"""What makes two rows the same measurement, of which the later one stays."""
COMPARED = ("recipe", "batch", "tokens_per_second")
"""What rows are set beside the teacher's by."""
SHOWN = ("tokens_per_second", "ratio", "milliseconds", "peak_gib", "first_seconds", "note")
HEADS = {
    "tokens_per_second": "tokens/s",
    "ratio": "times the teacher's",
    "milliseconds": "ms",
    "peak_gib": "peak GiB",
    "first_seconds": "first s",
}
UNITS = {
    "train": "forward and backward of the whole model, all weights train",
    "prefill": "reading a prompt",
    "decode": "one token of every text",
}


class Stopped(Exception):
    """The device is of no more use to this process."""


class Budget:
    """Seconds after which nothing new is begun. A row's first step, in which its kernels compile, does not count.

    Args:
        seconds: from now on; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.end is not None and time.monotonic() > self.end

    def leave_out(self, row: Row) -> None:
        """Do not count what the row took to compile."""
        if self.end is not None:
            self.end += row.get("first_seconds") or 0.0


def read(path: Path, needed: Sequence[str] = ()) -> list[Row]:
    """The rows of a file, none where there is no file.

    Args:
        path: of the file.
        needed: what each row must have.

    Raises:
        LinearizeError: the file holds something else.
    """
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row.keys() >= set(needed) for row in rows
    ):
        raise LinearizeError(f"{path}: not rows of this benchmark; move it away, or give another --out")
    return rows


def merged(before: Sequence[Row], row: Row) -> list[Row]:
    """The rows with this one, in the place of an earlier one of the same `KEY`."""
    key = [row.get(name) for name in KEY]
    return [*(old for old in before if [old.get(name) for name in KEY] != key), row]


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with their tokens a second as a multiple of the teacher's, at the same batch or else at its largest."""
    found = []
    for row in rows:
        beside = [
            other
            for other in rows
            if other["recipe"] == TEACHER
            and other["tokens_per_second"]
            and all(other.get(name) == row.get(name) for name in ("measured", "shape", "way", "length"))
        ]
        same = [other for other in beside if other["batch"] == row["batch"]]
        against = same[-1] if same else max(beside, key=lambda other: other["batch"], default=None)
        ratio = None
        if against is not None and row["tokens_per_second"]:
            ratio = round(row["tokens_per_second"] / against["tokens_per_second"], 3)
        found.append({**row, "ratio": ratio})
    return found


def write(path: Path, rows: Sequence[Row]) -> None:
    """All rows in one file, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def markdown(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """A page with the command and a table of each kind of measurement, shape and way."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    out = ["# Recipes", "", f"{about['device'].get('name', 'CPU')}; {versions}; {about['date']}.", ""]
    out += [f"```\n{about['command']}\n```", ""]
    kinds = dict.fromkeys((row["measured"], row["shape"], row.get("way", "")) for row in rows)
    for measured, shape, way in kinds:
        mine = [
            row
            for row in rows
            if (row["measured"], row["shape"], row.get("way", "")) == (measured, shape, way)
        ]
        mine.sort(key=lambda row: (row["length"], row["batch"]))
        out += [f"## {measured}, {shape}, {way}", "", f"{_words(measured)}.", ""]
        shown = [
            {
                **{name: row[name] for name in ("recipe", "batch", "length")},
                **{HEADS.get(name, name): _cell(row.get(name)) for name in SHOWN},
            }
            for row in mine
        ]
        out += [tables.markdown(shown), ""]
    return "\n".join(out)


def _words(measured: str) -> str:
    said = UNITS.get(measured) or measured
    return said[0].upper() + said[1:]


def _cell(value: Any) -> Any:
    return escaped(value) if isinstance(value, str) else value


class Table:
    """The rows of one command, and those that are there already, in a folder's recipes.json and recipes.md.

    Args:
        folder: of the files.
        say: prints a line.
        device: what the rows were measured on.
        options: of the command, for the page.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], None], device: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.path, self.say, self.started = folder / "recipes.json", say, time.monotonic()
        self.about = report.facts(device, None, options)
        self.rows = read(self.path, COMPARED)
        storing.make_folder(folder)

    def add(self, row: Row) -> None:
        """Write and say a row; what other processes have written into the folder meanwhile stays."""
        row = {**row, "device": self.about["device"].get("name", "CPU")}
        with FileLock(self.path.with_suffix(".lock")):
            self.rows = compared(merged(read(self.path, COMPARED), row))
            write(self.path, self.rows)
            self.path.with_suffix(".md").write_text(markdown(self.about, self.rows), encoding="utf-8")
        self.say(f"{time.monotonic() - self.started:4.0f} s  {said(self.rows[-1])}")


def said(row: Row) -> str:
    """A row as a line."""
    head = f"{row['measured']:8}{row['recipe']:26} batch {row['batch']:3}  length {row['length']:6}"
    if row["tokens_per_second"] is None:
        return f"{head}  {row['note']}"
    ratio = "" if row.get("ratio") is None else f"  {row['ratio']:6.3f} x teacher"
    peak = "" if row.get("peak_gib") is None else f"  {row['peak_gib']:7.2f} GiB"
    first = "" if row.get("first_seconds") is None else f"  first {row['first_seconds']:.1f} s"
    note = f"  ({row['note']})" if row["note"] else ""
    speed = f"{row['tokens_per_second']:12,.0f} tokens/s  {row['milliseconds']:10.3f} ms"
    return f"{head}  {speed}{peak}{ratio}{first}{note}"


def empty(note: str) -> Row:
    """What a row that was not measured holds."""
    return {"tokens_per_second": None, "milliseconds": None, "peak_gib": None, "note": note}


@contextmanager
def reported() -> Iterator[list[str]]:
    """Whatever is raised inside becomes one line in the list; its frames, and their tensors, are let go.

    Raises:
        Stopped: nothing runs on the device any more.
    """
    notes: list[str] = []
    try:
        yield notes
    except torch.OutOfMemoryError:
        notes.append("out of memory")
    except Exception as error:
        text = " ".join(str(error).split())
        notes.append(f"{type(error).__name__}: {text[:300]}")
    release()
    if notes and any(sign in notes[0] for sign in LOST):
        raise Stopped(notes[0])


def release() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SLOW = 10.0
"""Seconds of a call of which one is enough."""


def fill(
    table: Table,
    names: Sequence[str],
    rows: Callable[[str, Budget], Iterator[Row]],
    options: argparse.Namespace,
) -> None:
    """Measure the teacher and recipes into a table, row by row; with `--only` the named ones alone, beside others.

    Args:
        table: of the rows.
        names: of recipes.
        rows: gives those of one name, within a budget.
        options: budget, only, recipes, out.

    Raises:
        LinearizeError: the device was lost; says where the rows are.
    """
    budget = Budget(options.budget)
    beside = not options.only or TEACHER in options.recipes
    with quiet.known(options.out) if options.only else nullcontext():
        for name in [TEACHER, *names] if beside else names:
            try:
                for row in rows(name, budget):
                    table.add(row)
            except Stopped as stop:
                raise LinearizeError(f"{name}: {stop}; what was measured is in {table.path}") from stop


class Stopwatch:
    """Times calls: with events on a CUDA device, by the wall clock elsewhere.

    Args:
        device: where the calls run.
        spend: seconds to spend on the repeats of a call.
        least, most: repeats.
        turn: a file that processes who share the device lock while they time; None: there is no other.
        beside: the folder of processes that stand still meanwhile, see `quiet` (default: that of the turn, if any).
    """

    def __init__(
        self,
        device: torch.device,
        spend: float = 1.0,
        least: int = 3,
        most: int = 200,
        turn: Path | None = None,
        beside: Path | None = None,
    ) -> None:
        self.beside = turn.parent if beside is None and turn is not None else beside
        self.device, self.spend, self.least, self.most = device, spend, least, most
        self.turn: AbstractContextManager[Any] = nullcontext() if turn is None else FileLock(turn)

    def once(self, call: Callable[[], Any]) -> float:
        """Wall seconds of one call, until the device is done."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def seconds(self, call: Callable[[], Any], about: float) -> tuple[float, int]:
        """Median seconds from the start of a call to the next one's, back to back, and how many were timed.

        Args:
            call: has run before.
            about: seconds that one took just before; above SLOW that is the answer.
        """
        if about > SLOW:
            return about, 1
        with self.turn, quiet.others(self.beside):
            # before one's turn the device was busy with others
            again = min(about, self.once(call))
            count = max(self.least, min(self.most, round(self.spend / max(again, 1e-6))))
            if self.device.type != "cuda":
                spans = [self.once(call) for _ in range(count)]
            else:
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
                self.wait()
                marks[0].record()
                for mark in marks[1:]:
                    call()
                    mark.record()
                self.wait()
                spans = [1e-3 * a.elapsed_time(b) for a, b in pairwise(marks)]
        return sorted(spans)[len(spans) // 2], count

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Memory counts from here."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """GiB held at most since; None where nobody counts."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 3) if self.device.type == "cuda" else None
