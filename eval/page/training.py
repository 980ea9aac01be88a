"""What a run logged: how far each layer's output was from its teacher's, and perplexity from stage to stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from linearize.eval import tables
from linearize.eval.page.blocks import Block, Lines, Point, Section, Series, Style, Table
from linearize.eval.page.contestants import STUDENT_COLORS, Contestant
from linearize.eval.page.sources import Subject
from linearize.eval.report import Run
from linearize.eval.rows import STUDENT
from linearize.progress import count


def section(subjects: Sequence[Subject], cast: Sequence[Contestant]) -> Section:
    """Per-layer transfer errors at the first and the last step, and what the run itself measured."""
    styles = {one.name: one.style for one in cast if one.role == STUDENT}
    series: list[Series] = []
    rows: list[dict[str, object]] = []
    for number, subject in enumerate(subjects):
        if subject.run is None:
            continue
        style = styles.get(subject.name, Style(STUDENT_COLORS[number % len(STUDENT_COLORS)]))
        series += _layers(subject.name, subject.run, style)
        for line in tables.flatten(subject.run.rows, ("acc",)):
            rows.append({"run": subject.name, "at": line.pop("model"), **line})
    blocks: list[Block] = []
    if series:
        values = [point.y for one in series for point in one.points]
        blocks.append(
            Lines(
                "Transfer loss of each layer", "layer of the model", "loss", series,
                log_x=False, log_y=min(values) > 0,
            )
        )  # fmt: skip
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        blocks.append(Table([{name: row.get(name) for name in names} for row in rows], "While it trained"))
    return Section("Training", blocks, [(one.name, one.style) for one in series])


def _layers(name: str, run: Run, style: Style) -> list[Series]:
    """The first and the last line that has losses of layers."""
    lines = [line for line in run.metrics if line.get("layers")]
    made = []
    picked = [lines[0], lines[-1]] if len(lines) > 1 else lines
    for line, dash in zip(reversed(picked), ("solid", "dot"), strict=False):
        points = [
            Point(float(layer), float(value))
            for layer, value in zip(run.layers, line["layers"], strict=False)
            if math.isfinite(value)
        ]
        label = f"{name}, after {count(line.get('tokens', 0))} tokens"
        made.append(Series(label, Style(style.color, dash, style.marker), points))
    return [one for one in made if one.points]
