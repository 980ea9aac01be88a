"""`linearize bench decode`: tokens a second of a converted model and of its teacher, by batch and context."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linearize.bench.subjects import RANDOM, converted, random_model
from linearize.console import console, quiet_libraries
from linearize.decode.ways import Measured, Point, generate, graph, half, loop, room
from linearize.errors import LinearizeError

STATIC = "generate, static cache, compiled"
"""The yardstick: what transformers itself offers for speed."""
CONTEXT = (128, 1024, 8192)
"""Tokens of the prompts where none are given."""
TUNED = {"options": {"coordinate_descent_tuning": True}}
"""Inductor makes fused reductions of products with one row, and looks for their best tiles."""


@dataclass
class Way:
    """A way to decode one of the two models.

    Attributes:
        model: "converted" or "teacher".
        name: see the table.
        measure: see `decode.ways`.
        batches: those that it is for, or None for all.
        compiles: compiles anew for each point, so that it comes last where time is short.
    """

    model: str
    name: str
    measure: Callable[[Point], Measured]
    batches: tuple[int, ...] | None = None
    compiles: bool = False


def main(options: argparse.Namespace) -> int:
    """Measure, print the table, and write decode.json and decode.md.

    Args:
        options: path (a model, a converted checkpoint, or "random"), teacher (model that a checkpoint was converted
            from), recipe (mixer for an unconverted model), batch, context (tuples), new_tokens, budget (seconds after
            which nothing new is begun), shape (of a random model), recipes (several, see `decode_recipes`), out
            (folder).

    Raises:
        LinearizeError: no CUDA device, or the model is not found.
    """
    from linearize.bench import report
    from linearize.bench.clock import CudaClock, require_cuda

    if getattr(options, "recipes", None):
        from linearize.bench.decode_recipes import main as several

        return several(options)
    require_cuda()
    quiet_libraries()
    started = time.monotonic()
    clock = CudaClock(spend=100.0)
    ceilings = clock.ceilings()
    del clock.other
    recipe = getattr(options, "recipe", None) or "lolcats"
    student, teacher = models(options.path, getattr(options, "teacher", None), recipe, options.shape)
    points = [Point(b, c, options.new_tokens) for b in options.batch for c in options.context or CONTEXT]
    budget = getattr(options, "budget", None)
    deadline = None if budget is None else started + budget
    about = report.facts(clock.describe(), ceilings, report.given(options))
    folder: Path = options.out
    rows: list[dict[str, Any]] = []
    for row in measure(ways(student, teacher), points, deadline):
        rows.append(row | floor(row, student if row["model"] == "converted" else teacher, ceilings.bandwidth))
        spent = time.monotonic() - started
        console().print(f"{spent:4.0f} s  {said(row)}", markup=False, soft_wrap=True)
        report.write_rows(folder, "decode", about, compared(rows))
    console().print(report.write_rows(folder, "decode", about, compared(rows)), markup=False, soft_wrap=True)
    return 0


def models(path: str, teacher: str | None, recipe: str, shape: str) -> tuple[Any, Any]:
    """The converted model and its teacher, both in bfloat16 on the GPU; the teacher None where nobody named it."""
    from linearize import models as loading
    from linearize.cli.checkpoint import load

    if path == RANDOM:
        return converted(random_model("cuda", torch.bfloat16, shape), recipe)
    given, _ = load(path, "cuda")
    given = given.to(torch.bfloat16) if not hasattr(given.config, "linearize") else half(given)
    if not hasattr(given.config, "linearize"):
        return converted(given, recipe)
    softmax = None
    if teacher is not None:
        softmax, _ = loading.load_teacher(teacher, dtype="bfloat16", device="cuda")
    return given, softmax


def ways(student: Any, teacher: Any | None) -> list[Way]:
    """All ways, in the order in which they are worth their time."""
    made = [
        Way("converted", "graph", graph(student, None)),
        Way("converted", "graph, compiled", graph(student, {})),
        Way("converted", "graph, compiled, tuned", graph(student, TUNED), batches=(1,)),
    ]
    if teacher is not None:
        made += [
            Way("teacher", STATIC, generate(teacher, cache_implementation="static"), compiles=True),
            Way(
                "teacher",
                "loop, static cache, compiled",
                loop(teacher, mode="reduce-overhead"),
                compiles=True,
            ),
            Way("teacher", "generate", generate(teacher)),
        ]
    return [*made, Way("converted", "generate", generate(student))]


def measure(
    ways: Sequence[Way], points: Sequence[Point], deadline: float | None = None
) -> Iterator[dict[str, Any]]:
    """One row for each way and point. What compiles anew for each point is done at the ends of the table first.

    Args:
        ways, points: what to measure.
        deadline: of `time.monotonic`; nothing is begun behind it.
    """
    ends = [points[0], points[-1]] if len(points) > 1 else list(points)
    rest = [point for point in points if point not in ends]
    todo = [(way, point) for way in ways for point in (*ends, *(() if way.compiles else rest))]
    todo += [(way, point) for way in ways if way.compiles for point in rest]
    for way, point in todo:
        if way.batches is not None and point.batch not in way.batches:
            continue
        row: dict[str, Any] = {
            "model": way.model,
            "way": way.name,
            "batch": point.batch,
            "context": point.context,
        }
        seconds, held, note = None, None, ""
        if deadline is not None and time.monotonic() > deadline:
            note = "no time left"
        else:
            try:
                with room(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
                    if way.compiles:
                        torch._dynamo.reset()
                    seconds, held = way.measure(point)
            except (RuntimeError, ValueError, LinearizeError) as error:
                note = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
        yield row | {
            "ms per token": None if seconds is None else round(1e3 * seconds, 4),
            "tokens/s": None if seconds is None else round(point.batch / seconds, 1),
            "cache MiB": None if held is None else round(held / 2**20, 2),
            "note": note,
        }


def floor(row: dict[str, Any], model: Any, bandwidth: float) -> dict[str, Any]:
    """Milliseconds to read the weights and the cache once; a state is written too, keys and values are not."""
    if row["cache MiB"] is None:
        return {"floor ms": None}
    weights = sum(
        x.numel() * x.element_size() for x in {x.data_ptr(): x for x in model.parameters()}.values()
    )
    passes = 2 if row["model"] == "converted" else 1
    return {"floor ms": round(1e3 * (weights + passes * row["cache MiB"] * 2**20) / bandwidth, 4)}


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their speed as a multiple of the teacher's with a static cache, compiled, at the same point."""
    base = {
        (row["batch"], row["context"]): row["tokens/s"]
        for row in rows
        if row["model"] == "teacher" and row["way"] == STATIC and row["tokens/s"]
    }
    made = []
    for row in rows:
        other = base.get((row["batch"], row["context"]))
        ratio = round(row["tokens/s"] / other, 2) if other and row["tokens/s"] else None
        made.append({**row, "times the teacher": ratio, "note": row["note"]})
    order = {"converted": 0, "teacher": 1}
    return sorted(made, key=lambda row: (row["batch"], row["context"], order[row["model"]]))


def said(row: dict[str, Any]) -> str:
    """A row as a line."""
    speed = (
        row["note"]
        or f"{row['tokens/s']:10.1f} tokens/s {row['ms per token']:8.3f} ms {row['cache MiB']:9.1f} MiB"
    )
    return f"{row['model']:9}  {row['way']:34}  batch {row['batch']:3}  context {row['context']:5}  {speed}"
