"""The scores of a suite for the terminal: a table of the text, one of recall, and whatever else it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group, RenderableType

from linearize.eval.rows import METRICS, STUDENT, TEACHER, Score
from linearize.eval.suite import Suite
from linearize.eval.tables import number, rich_table

Row = dict[str, Any]


def tables(suite: Suite, rows: Sequence[Score], roles: Sequence[str]) -> RenderableType:
    """All tables of a suite.

    Args:
        suite: for the title.
        rows: its scores.
        roles: of the cast, in the order of the lines.
    """
    parts: list[RenderableType] = []
    texts = dict.fromkeys((row.task, row.length) for row in rows if row.task.split(":")[0] == "text")
    for task, length in texts:
        here = [row for row in rows if (row.task, row.length) == (task, length)]
        parts.append(rich_table(_text(here, roles), f"{suite.name}: {task}, {length:,} tokens"))
    return Group(*parts)


def _text(rows: Sequence[Score], roles: Sequence[str]) -> list[Row]:
    """Over everything: perplexity, distance to the student and to the teacher, hits against others."""
    columns: dict[str, tuple[str, Callable[[Score], str]]] = {
        "ppl": ("ppl", _plain),
        "ppl 95%": ("ppl", _interval),
        "nll minus student's": ("nll_difference", _interval),
        "KL to teacher": ("kl", _interval),
        "hits ppl": ("ppl_hit", _plain),
        "others ppl": ("ppl_other", _plain),
    }
    made = []
    for role in roles:
        own = {row.metric: row for row in rows if row.role == role and not row.by}
        if own:
            line: Row = {"model": label(role, rows)}
            for title, (metric, show) in columns.items():
                line[title] = show(own[metric]) if metric in own else None
            made.append(line)
    return [{key: value for key, value in row.items() if key == "model" or _any(made, key)} for row in made]


def label(role: str, rows: Sequence[Score]) -> str:
    """What a line is called: the models by their own names, controls by their roles."""
    name = next((row.model for row in rows if row.role == role), role)
    return f"{name} ({role})" if role in (STUDENT, TEACHER) else role


def _any(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) not in (None, "") for row in rows)


def _plain(row: Score) -> str:
    share = METRICS.get(row.metric)
    return f"{100 * row.value:.1f}" if share is not None and share.share else number(row.value)


def _interval(row: Score) -> str:
    if row.low is None or row.high is None:
        return _plain(row)
    signed = row.metric == "nll_difference"
    if signed:
        return f"{row.low:+.3f} {row.high:+.3f}"
    return f"{number(row.low)} {number(row.high)}"
