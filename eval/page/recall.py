"""Recall on a page: against length where there are several, task under task where there is one, and by depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from linearize.eval.page.blocks import Block, Dots, Heat, Lines, Point, Series
from linearize.eval.page.contestants import Contestant, short
from linearize.eval.page.verdict import written
from linearize.eval.rows import Score

BANDS = 5
"""Rows of a heat map of depths that were drawn."""
APART = 0.011
"""Even steps between depths, which rows write with two digits, differ by no more."""


def by_length(cast: Sequence[Contestant]) -> Iterator[Block]:
    """Shares that were written right: a chart for each task that has several lengths, one for all others."""
    found = [(one, written(one.rows)) for one in cast]
    lengths: dict[str, set[int]] = {}
    for task, length in dict.fromkeys(place for _, own in found for place in own):
        lengths.setdefault(task, set()).add(length)
    for task, several in lengths.items():
        if len(several) > 1:
            series = [
                Series(
                    one.name,
                    one.style,
                    [point(own[place], 100.0) for place in sorted(own) if place[0] == task],
                )
                for one, own in found
            ]
            yield Lines(
                f"{task}, written right",
                "tokens of context",
                "%",
                [s for s in series if s.points],
                share=True,
            )
    single = [(task, *several) for task, several in lengths.items() if len(several) == 1]
    if single:
        series = [
            Series(
                one.name,
                one.style,
                [point(own[place], 100.0, number) for number, place in enumerate(single) if place in own],
            )
            for one, own in found
        ]
        rows = [f"{task}, {length:,}" for task, length in single]
        yield Dots(
            "Written right, tasks of one length",
            "task, tokens of context",
            "%",
            rows,
            [s for s in series if s.points],
        )


def by_depth(cast: Sequence[Contestant]) -> Iterator[Block]:
    """A heat map for each model and task: depths in even steps as they are, drawn ones in bands."""
    for task in dict.fromkeys(task for one in cast for task, _ in written(one.rows)):
        for one in cast:
            metrics = {row.metric for row in written(one.rows).values() if row.task == task}
            rows = [
                row
                for row in one.rows
                if row.task == task and row.by == "depth" and row.metric in metrics and row.length is not None
            ]
            depths = sorted({row.bucket for row in rows}, key=float)
            lengths = sorted({row.length for row in rows if row.length is not None})
            names = [f"{length:,}" for length in lengths]
            title = f"{short(one.name)}: {task}"
            if not rows:
                continue
            if _even([float(depth) for depth in depths]):
                values = [[_mean(rows, [depth], length) for length in lengths] for depth in depths]
                yield Heat(title, names, [f"{100 * float(depth):.0f} %" for depth in depths], values)
            elif len(lengths) > 1:  # of one length, a few items a band say no more than their mean
                bands = [[depth for depth in depths if _band(depth) == band] for band in range(BANDS)]
                values = [[_mean(rows, band, length) for length in lengths] for band in bands]
                width = 100 // BANDS
                shown = [f"{width * band} to {width * (band + 1)} %" for band in range(BANDS)]
                yield Heat(title, names, shown, values)


def point(row: Score, factor: float = 1.0, x: float | None = None) -> Point:
    """A score at its length, or at a place of its own."""
    low, high = (None if end is None else factor * end for end in (row.low, row.high))
    return Point(float(row.length or 0) if x is None else float(x), factor * row.value, low, high)


def _even(depths: Sequence[float]) -> bool:
    steps = [after - before for before, after in pairwise(depths)]
    return bool(steps) and depths[0] == 0 and depths[-1] == 1 and max(steps) - min(steps) <= APART


def _band(depth: str) -> int:
    return min(BANDS - 1, int(float(depth) * BANDS))


def _mean(rows: Sequence[Score], depths: Sequence[str], length: int) -> float | None:
    """Over the items at these depths; None where there are none."""
    here = [row for row in rows if row.length == length and row.bucket in depths]
    items = sum(row.n for row in here)
    return sum(row.n * row.value for row in here) / items if items else None
