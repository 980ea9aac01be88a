"""What a page is made of, as plain data: every chart can also be a table, so that no reader needs a browser.

Text in a block is text as it was found; whoever writes it escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How a contestant is drawn, the same in every chart of a page."""

    color: str
    dash: str = "solid"
    """solid, dash or dot."""
    marker: str = "circle"


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows with the same columns; numbers are formatted by `tables.number`."""

    rows: Sequence[Row]
    title: str = ""


@dataclass(frozen=True)
class Point:
    """One value, with its 95 % interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    """What the place on the x axis is called, such as "64-128"; "" for the number itself."""


@dataclass(frozen=True)
class Series:
    """One contestant's line."""

    name: str
    style: Style
    points: Sequence[Point]


@dataclass(frozen=True)
class Lines:
    """Values against context, or against the layer."""

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    log_x: bool = True
    log_y: bool = False
    share: bool = False
    """Whether y is percent, drawn from 0 to 100."""

    def table(self) -> Table:
        """A line for each place, a column for each series."""
        places: dict[float, Row] = {}
        for one in self.series:
            for point in one.points:
                line = places.setdefault(point.x, {self.x_title: point.label or _whole(point.x)})
                line[one.name] = point.y
        names = [one.name for one in self.series]
        rows = [
            {self.x_title: places[x][self.x_title], **{name: places[x].get(name) for name in names}}
            for x in sorted(places)
        ]
        return Table(rows, self.title)


@dataclass(frozen=True)
class Heat:
    """Shares of 1 by depth and length."""

    title: str
    columns: Sequence[str]
    """Lengths, from short to long."""
    rows: Sequence[str]
    """Depths, from the beginning of the context to its end."""
    values: Sequence[Sequence[float | None]]
    """[rows][columns]; None where nothing was measured."""

    def table(self) -> Table:
        """In whole percent."""
        made = []
        for depth, values in zip(self.rows, self.values, strict=True):
            shown = [None if value is None else round(100 * value) for value in values]
            made.append({"depth \\ tokens": depth, **dict(zip(self.columns, shown, strict=True))})
        return Table(made, self.title)


@dataclass(frozen=True)
class Dots:
    """Percentages of many measurements, one under the other."""

    title: str
    y_title: str
    """What the rows are."""
    x_title: str
    rows: Sequence[str]
    series: Sequence[Series]
    """A point's x is the number of its row."""

    def table(self) -> Table:
        """A line for each row, a column for each series."""
        columns = {one.name: {point.x: point.y for point in one.points} for one in self.series}
        made = [
            {self.y_title: row, **{name: values.get(float(number)) for name, values in columns.items()}}
            for number, row in enumerate(self.rows)
        ]
        return Table(made, self.title)


@dataclass(frozen=True)
class Bar:
    """One bar."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    style: Style = field(default_factory=lambda: Style("#0072B2"))


@dataclass(frozen=True)
class Bars:
    """Values side by side, one a contestant or control."""

    title: str
    x_title: str
    bars: Sequence[Bar]
    log: bool = False
    share: bool = False

    def table(self) -> Table:
        """A line for each bar."""
        return Table(
            [
                {"model": bar.name, self.x_title: bar.value, "95 %": _ends(bar.low, bar.high)}
                for bar in self.bars
            ],
            self.title,
        )


@dataclass(frozen=True)
class Sample:
    """What the contestants wrote behind one prompt."""

    prompt: str
    texts: Sequence[tuple[str, str]]
    """(contestant, text)."""


@dataclass(frozen=True)
class Samples:
    """Continuations side by side."""

    samples: Sequence[Sample]


Block = Words | Table | Lines | Dots | Heat | Bars | Samples
Chart = Lines | Dots | Heat | Bars


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    title: str
    blocks: Sequence[Block]
    legend: Sequence[tuple[str, Style]] = ()
    """(name, style) of the lines in its charts."""


@dataclass(frozen=True)
class Finding:
    """A sentence of the verdict."""

    grade: str
    """good, bad, or open: measured, but the interval allows both."""
    text: str


@dataclass(frozen=True)
class Page:
    """Everything."""

    title: str
    headline: Finding
    findings: Sequence[Finding]
    sections: Sequence[Section]


def _whole(x: float) -> Any:
    return int(x) if float(x).is_integer() else x


def _ends(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:.4g} to {high:.4g}"
