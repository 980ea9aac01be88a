"""Rows of numbers as a table for the terminal and as markdown."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.table import Table

from linearize import plain_json
from linearize.markdown import row as line_of
from linearize.markdown import text as escaped

Row = Mapping[str, Any]

METRICS = {"acc": "acc %", "acc_norm": "acc_norm %", "perplexity": "ppl"}
"""How a task's metric is headed; metrics that are not here stay out of tables."""


def number(value: Any) -> str:
    """A value as a reader wants it: 21.43, 621.4, 1,975, 3.1e+08, inf; "" for None; text as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.1e}"
    if size < 1:
        return f"{value:.4f}"
    decimals = 2 if size < 99.995 else 1 if size < 999.95 else 0
    return f"{value:,.{decimals}f}"


def restored(row: Row) -> dict[str, Any]:
    """A row as it was before results.json was written: its numbers as numbers, those that are not finite among them."""
    parts = [part for part in ("perplexity", "tasks") if part in row]
    return {**row, **{part: plain_json.restored(row[part]) for part in parts}}


def flatten(rows: Sequence[Row], metrics: Sequence[str] = tuple(METRICS)) -> list[dict[str, Any]]:
    """Rows of results.json as flat rows that all have the same columns: perplexities first, then tasks.

    Args:
        rows: ``{"name": ..., "perplexity": {text: value}, "tasks": {task: {metric: value}}}``. A perplexity may also be
            the dictionary of `Perplexity.to_dict`.
        metrics: which metrics of a task become columns; ["acc"] makes a narrow table.

    Returns:
        ``{"model": name, "wikitext2 ppl": 21.43, "piqa acc %": "65.9"}``; accuracies are percent; None where a row
        lacks what another has.
    """
    texts = dict.fromkeys(text for row in rows for text in row.get("perplexity") or {})
    scored = [scores for row in rows for scores in (row.get("tasks") or {}).items()]
    tasks = dict.fromkeys((task, metric) for task, scores in scored for metric in metrics if metric in scores)
    flat = []
    for row in rows:
        out: dict[str, Any] = {"model": row.get("name", "")}
        for text in texts:
            value = (row.get("perplexity") or {}).get(text)
            out[f"{text} ppl"] = value.get("value") if isinstance(value, Mapping) else value
        for task, metric in tasks:
            value = ((row.get("tasks") or {}).get(task) or {}).get(metric)
            if value is not None and metric.startswith("acc"):
                value = f"{100 * value:.1f}"
            out[f"{task} {METRICS[metric]}"] = value
        flat.append(out)
    return flat


def sections(rows: Sequence[Row], metrics: Sequence[str] = tuple(METRICS)) -> dict[str, list[dict[str, Any]]]:
    """The same as two narrower tables, "Perplexity" and "Tasks".

    A table without columns is left out, and so are rows that have no number for it.

    Args:
        rows, metrics: as for `flatten`.
    """
    parts = {
        "Perplexity": [{**row, "tasks": None} for row in rows if row.get("perplexity")],
        "Tasks": [{**row, "perplexity": None} for row in rows if row.get("tasks")],
    }
    return {title: flatten(part, metrics) for title, part in parts.items() if part}


class Fitted:
    """Rows for rich's console: text to the left, numbers to the right; headers are broken to keep columns narrow.

    Where the console is narrower than all columns, those that do not fit stand below, behind the same first ones: rich
    would cut them off. No number is broken, and words of headers only where
    one table would become two, and where they are long.

    Args:
        rows: of one table.
        title: above it.
        numeric: columns that stand to the right, and are never broken, though they hold units or words beside numbers.
    """

    def __init__(self, rows: Sequence[Row], title: str | None = None, numeric: Collection[str] = ()) -> None:
        self.rows, self.title, self.numeric = rows, title, numeric

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One table, or several below each other."""
        columns = [
            _column(self.rows, name, name in self.numeric or is_numeric(self.rows, name))
            for name in dict.fromkeys(key for row in self.rows for key in row)
        ]
        keys = max(1, len(list(takewhile(lambda column: column.name in KEYS, columns))))
        part, title, most = columns[:keys], self.title, options.max_width
        for column in columns[keys:]:
            if len(part) > keys and _total(one.least for one in [*part, column]) > most:
                yield self._table(part, title, most)
                part, title = columns[:keys], None
            part = [*part, column]
        yield self._table(part, title, most)

    def _table(self, columns: Sequence[_Column], title: str | None, most: int) -> Table:
        table = Table(
            title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for one, width in zip(columns, _widths(columns, most), strict=True):
            side: Literal["left", "right"] = "right" if one.numeric else "left"
            table.add_column(one.header, justify=side, width=width, overflow="fold")
        table.padding = (0, 1, 0, 0)
        for row in self.rows:
            table.add_row(*(escape(number(row.get(one.name))) for one in columns))
        return table


KEYS = (
    "model",
    "task",
    "metric",
    "by",
    "distance",
    "position",
    "tokens",
    "batch",
    "layer",
    "layers",
    "blocks",
    "stage",
    "kept",
    "restored",
)
"""What first columns say which row it is."""
WORDS = 18
"""Characters of text that a column is never narrower than, where it has as many."""
SHORT = 6
"""Characters of a word above numbers that is never broken."""


class _Column(NamedTuple):
    name: str
    header: str
    numeric: bool
    least: int
    """Characters that it is never narrower than."""
    width: int
    """Those that it likes to have."""


def _column(rows: Sequence[Row], name: str, numeric: bool) -> _Column:
    header = name.replace("_", "_\n").replace(" ", "\n", 1) if numeric else name
    widest = max((cell_len(number(row.get(name))) for row in rows), default=1)
    words = max((cell_len(word) for word in header.split()), default=0)
    least = max(1, widest, min(words, SHORT)) if numeric else max(1, min(widest, WORDS))
    return _Column(name, header, numeric, least, max([least, widest, *map(cell_len, header.split("\n"))]))


def _widths(columns: Sequence[_Column], most: int) -> list[int]:
    """What each column gets: where there is not room for all, those that can spare most give way first."""
    widths = [one.width for one in columns]
    while _total(widths) > most:
        spare = [width - one.least for width, one in zip(widths, columns, strict=True)]
        if not any(spare):
            break
        widths[spare.index(max(spare))] -= 1
    return widths


def _total(widths: Iterable[int]) -> int:
    """Characters of a line, with what stands between columns and around them."""
    return sum(width + 2 for width in widths)


def results(rows: Sequence[Row], metrics: Sequence[str] = tuple(METRICS)) -> Group:
    """All of results.json for the terminal: a table of perplexities and, where there are any, one of the tasks.

    Args:
        rows, metrics: as for `flatten`.
    """
    return Group(*(Fitted(part, title) for title, part in sections(rows, metrics).items()))


def markdown(rows: Sequence[Row]) -> str:
    """The same table in GitHub's markdown, whatever names and values hold; "" for no rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return ""
    rule = ["---:" if is_numeric(rows, name) else "---" for name in names]
    body = [[escaped(number(row.get(name))) for name in names] for row in rows]
    return "\n".join(line_of(line) for line in [[escaped(name) for name in names], rule, *body])


def is_numeric(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds numbers, or text that reads as one, in every row that has it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(_reads_as_number(value) for value in values)


def _reads_as_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)
