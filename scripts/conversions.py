"""Conversions for a comparison: each run and judged in processes of its own, one a device, and read into one row."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sheet import ROOT, number

from linearize.eval import summary
from linearize.eval.ablation import NO_LINEAR
from linearize.eval.cast import SINKS
from linearize.eval.rows import STUDENT, TEACHER, Score, Scores

Row = dict[str, Any]
RECALL = ("exact", "recalled", "choice")
"""How a recall task is scored; the first that it has."""


@dataclass
class Conversion:
    """One run of a comparison.

    Attributes:
        name: of its row and folder.
        model, recipe, overrides: as `linearize run` takes them.
        budget: of `--budget`, "" for none.
        runs: folder of all runs.
        judging: options of `linearize eval`.
    """

    name: str
    model: str
    recipe: str
    overrides: list[str]
    budget: str
    runs: Path
    judging: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.runs / self.name

    @property
    def log(self) -> Path:
        """What its processes said."""
        return self.runs / f"{self.name}.log"

    def made(self, environment: dict[str, str]) -> Row:
        """Run and judge, going on where an earlier call was stopped; {"failed": ...} where it did not work.

        Args:
            environment: of its processes.
        """
        self.runs.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "done.json").is_file():
            command = ["run", self.model, self.recipe, *self.overrides, "--out", str(self.folder), "--resume"]
            if self._call(command + (["--budget", self.budget] if self.budget else []), environment):
                return {"failed": self._said()}
        self._teacher_from_beside()
        if self._call(["eval", str(self.folder), *self.judging], environment):
            return {"failed": self._said()}
        return row(self.folder)

    def _call(self, command: list[str], environment: dict[str, str]) -> int:
        with self.log.open("a") as log:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            return subprocess.call(
                [sys.executable, "-m", "linearize", *command],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path, **environment},
            )  # fmt: skip

    def _said(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " ".join(lines[-3:])[:500]

    def _teacher_from_beside(self) -> None:
        """Take over what another run of this comparison found of the same teacher: it has the same keys."""
        path = self.folder / "eval" / "results.json"
        others = [
            other for other in self.runs.glob("*/eval/results.json") if other.parent.parent != self.folder
        ]
        if path.exists() or not others:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        Scores(path).add([score for score in Scores(others[0]).rows if score.role == TEACHER])


def made(conversions: Sequence[Conversion], jobs: int, *, stop_after: float) -> Iterator[tuple[str, Row]]:
    """Rows as they come.

    Args:
        conversions: what to make.
        jobs: at once; where there are several GPUs, each job has one to itself.
        stop_after: seconds after which nothing new is begun.
    """
    began, devices = time.monotonic(), max(1, torch.cuda.device_count())
    free: queue.Queue[int] = queue.Queue()
    for job in range(jobs):
        free.put(job % devices)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if jobs > 1 else {}

    def one(conversion: Conversion) -> tuple[str, Row | None]:
        device = free.get()
        try:
            if time.monotonic() - began > stop_after:
                return conversion.name, None
            own = {"CUDA_VISIBLE_DEVICES": str(device)} if devices > 1 else {}
            return conversion.name, conversion.made({**threads, **own})
        finally:
            free.put(device)

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(one, conversion) for conversion in conversions]):
            name, found = done.result()
            if found is not None:
                yield name, found


def row(run: Path) -> Row:
    """What a run and its judgement came to, teacher and control beside it."""
    scores = Scores(run / "eval" / "results.json").rows
    found: Row = {"training": training(run), "student": figures(scores, STUDENT)}
    found["teacher"], found["swa_sinks"] = figures(scores, TEACHER), figures(scores, SINKS)
    off = figures(scores, NO_LINEAR)
    found["linear_off"] = {key: value for key, value in off.items() if key.startswith("ppl")}
    return found


def training(run: Path) -> Row:
    """Tokens, seconds and stages of a run, from the lines of its metrics."""
    lines, seconds, stages = [], 0.0, {}
    if (path := run / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for line in lines:
        before = stages.get(line["stage"], 0)
        seconds += (line["tokens"] - before) / max(line["tokens_per_second"], 1e-9)
        stages[line["stage"]] = line["tokens"]
    environment = json.loads((run / "environment.json").read_text())
    return {
        "tokens": sum(stages.values()),
        "stages": stages,
        "seconds": round(seconds, 1),
        "device": environment.get("device"),
        "packages": environment.get("packages"),
    }


def figures(scores: Sequence[Score], role: str) -> dict[str, float]:
    """The numbers of one model by what they are: "ppl demo 1024", "recall passkey 2048", "decode bytes 4096 x1"."""
    return {key: score.value for key, score in named(scores, role)}


def bounds(scores: Sequence[Score], role: str) -> dict[str, list[float | None]]:
    """The 95 % intervals of `figures`, of those that have one."""
    return {key: [x.low, x.high] for key, x in named(scores, role) if x.low is not None}


def named(scores: Sequence[Score], role: str) -> Iterator[tuple[str, Score]]:
    """What of a model's scores a table shows, each under its name."""
    for score in (score for score in scores if score.role == role):
        where = f"{score.length or ''}".strip()
        if summary.is_text(score):
            text = score.task.partition(":")[2].strip() or "demo"
            if score.metric in ("ppl", "kl") and not score.by:
                yield f"{score.metric} {text} {where}", score
            elif score.metric == "ppl_hit" and summary.is_beyond(score):
                yield f"hit ppl {text} {where}", score
        elif "lm-eval" in score.version:
            if score.metric == "acc":
                yield f"task {score.task.split(' ')[0]}", score
        elif score.task in ("decode", "prefill"):
            name = {"tokens_per_second": "tokens/s", "cache_bytes": "bytes"}.get(score.metric)
            if name:
                yield f"{score.task} {name} {where} x{score.bucket or 1}", score
        elif not score.by and score.metric in RECALL:
            known = [s.metric for s in scores if (s.task, s.length, s.by) == (score.task, score.length, "")]
            if score.metric == next(metric for metric in RECALL if metric in known):
                yield f"recall {score.task} {where}", score
            elif score.metric == "choice":
                yield f"choice {score.task} {where}", score


def columns(found: Row) -> dict[str, float | None]:
    """Title -> value of a row's cell, in the order of the table."""
    student, teacher, cells = found["student"], found["teacher"], {}

    def kept(key: str) -> float | None:
        return None if not teacher.get(key) else student[key] / teacher[key]

    for key in [key for key in student if key.startswith("ppl")]:
        cells[key] = student[key]
        cells[f"x teacher's, {key[4:]}"] = kept(key)
        if key in found.get("linear_off", {}):
            cells[f"x with linear off, {key[4:]}"] = found["linear_off"][key] / student[key]
    for key in [key for key in student if key.startswith("kl")]:
        cells[key] = student[key]
    for key in [key for key in student if key.startswith("hit ppl")]:
        ratio = kept(key)
        cells[f"nats at recalled, {key[8:]}"] = None if not ratio else math.log(ratio)
    for key in [key for key in student if key.startswith("recall")]:
        cells[_title(key)] = 100 * student[key]
    for key in [key for key in student if key.startswith("choice")]:
        cells[_title(key)] = 100 * student[key]
    tasks = [key for key in student if key.startswith("task") and teacher.get(key)]
    shares = {key[5:]: student[key] / teacher[key] for key in tasks}
    if "lambada_openai" in shares:
        cells["LAMBADA kept, %"] = 100 * shares.pop("lambada_openai")
    if shares:
        cells[f"{len(shares)} tasks kept, %"] = 100 * sum(shares.values()) / len(shares)
    for key in [key for key in student if key.startswith(("decode", "prefill"))]:
        cells[key.replace("bytes", "KiB")] = student[key] / (1024 if "bytes" in key else 1)
    if "held_bytes" in found:
        cells["MiB held at 8,192 tokens"] = found["held_bytes"] / 2**20
    if "decoding" in found:
        cells["decode tokens/s, 64 x 8,192"] = found["decoding"]
    if "training_speed" in found:
        cells["forward + backward tokens/s, 64 x 1,024"] = found["training_speed"]
    if "training" in found:
        cells["M tokens"] = found["training"]["tokens"] / 1e6
        cells["seconds"] = found["training"].get("seconds")
    return {title: value for title, value in cells.items() if value is not None}


def intervals(found: Row) -> dict[str, str]:
    """Title of a cell -> its 95 % interval behind the value, where the row has one."""
    shown = {}
    for key, (low, high) in found.get("bounds", {}).items():
        scale, digits = (
            (100, 0) if key.startswith(("recall", "choice")) else (1, 3 if key.startswith("kl") else 2)
        )
        if (title := _title(key)) and low is not None and high is not None:
            shown[title] = f" [{number(scale * low, digits)}, {number(scale * high, digits)}]"
    return shown


def _title(key: str) -> str:
    """Of the cell that shows a figure as it is."""
    if key.startswith("recall"):
        return f"{key[7:]}, %"
    if key.startswith("choice"):
        return f"{key[7:]}, the right one likeliest, %"
    return key if key.startswith(("ppl", "kl")) else ""


def titles(cells: Sequence[dict[str, float | None]]) -> list[str]:
    """Of the columns that some row has, in the order of the fullest row."""
    return list(dict.fromkeys(title for row in sorted(cells, key=len, reverse=True) for title in row))


def ranked(rows: dict[str, Row], key: Callable[[Row], float] | None = None) -> list[tuple[str, Row]]:
    """Those that worked, the lowest geometric mean of perplexities over the teacher's first."""
    worked = [(name, row) for name, row in rows.items() if "student" in row]
    return sorted(worked, key=lambda pair: (key or ratio)(pair[1]))


def ratio(row: Row) -> float:
    """Geometric mean over texts of the perplexity over the teacher's."""
    logs = [
        math.log(value / row["teacher"][key])
        for key, value in row["student"].items()
        if key.startswith("ppl") and row["teacher"].get(key)
    ]
    return math.exp(sum(logs) / len(logs)) if logs else math.inf


def controls(rows: dict[str, Row]) -> dict[str, Row]:
    """The teacher and the untrained window, as rows, from the first row that has them."""
    for row in rows.values():
        if row.get("teacher"):
            made = {"**teacher**": {"student": row["teacher"], "teacher": row["teacher"]}}
            if row.get("swa_sinks"):
                made["**swa_sinks, untrained**"] = {"student": row["swa_sinks"], "teacher": row["teacher"]}
            return made
    return {}


def failures(rows: dict[str, Row]) -> list[str]:
    """A sentence for each that did not work."""
    return [f"- {name}: {row['failed']}" for name, row in rows.items() if "failed" in row]
