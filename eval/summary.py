"""The scores of a suite for the terminal: tables of text and of recall, and what they say, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from linearize.eval.ablation import NO_LINEAR, NO_WINDOW
from linearize.eval.cast import CONTROLS, SINKS, UNTRAINED
from linearize.eval.recall_split import beyond, name
from linearize.eval.rows import METRICS, STUDENT, TEACHER, Score
from linearize.eval.suite import Suite
from linearize.eval.tables import Fitted, number

Row = dict[str, Any]

SHORT = {NO_LINEAR: "linear off", NO_WINDOW: "window off", UNTRAINED: "untrained"}
"""Roles as headings of narrow columns."""
GENERATED = ("exact", "recalled")
"""What a recall task is scored by when the model writes; the first that a task has is shown."""
FAILS = 0.5
"""Below this share of a recall task, a teacher has nothing that a student could lose."""


def tables(suite: Suite, rows: Sequence[Score], roles: Sequence[str]) -> RenderableType:
    """All tables of a suite, and the words under them.

    Args:
        suite: for the titles.
        rows: its scores.
        roles: of the cast, in the order of lines and columns.
    """
    parts: list[RenderableType] = []
    for task, length in dict.fromkeys((row.task, row.length) for row in rows if is_text(row)):
        here = [row for row in rows if (row.task, row.length) == (task, length)]
        parts.append(Fitted(_text(here, roles), f"{suite.name}: {task}, windows of {length:,} tokens"))
        for metric, by, title in (
            ("ppl_hit", "distance", "Perplexity of repeated pairs by the distance to the last occurrence"),
            ("ppl", "position", "Perplexity by position in the window"),
        ):
            found = _by_bucket(here, roles, metric, by)
            if len(found) > 1:
                parts.append(Fitted(found, title))
    for title, lines in (
        ("recall, % right", _recall(rows, roles)),
        ("tasks of lm-eval", _tasks(rows, roles)),
        ("what it writes", _plainly(rows, roles, ("decoding", "generation"))),
        ("time and memory by context and batch", _plainly(rows, roles, ("prefill", "decode"))),
        ("from which context on the student is ahead", _crossovers(rows)),
    ):
        if lines:
            parts.append(Fitted(lines, f"{suite.name}: {title}"))
    words = list(verdicts(rows))
    if words:
        parts.append(Text("\n".join([*words, ""])))
    return Group(*parts)


def is_text(row: Score) -> bool:
    """Whether a score is one of running text."""
    return row.task.split(":")[0] == "text"


def is_given(role: str) -> bool:
    """Whether a role is a control that is a checkpoint of its own, such as the teacher trained the same way."""
    return role not in (STUDENT, TEACHER, *CONTROLS)


def label(role: str, rows: Sequence[Score]) -> str:
    """What a line is called: the models by their own names, controls by their roles."""
    found = next((row.model for row in rows if row.role == role), role)
    return f"{found} ({role})" if role in (STUDENT, TEACHER) else role


def verdicts(rows: Sequence[Score]) -> Iterator[str]:
    """Sentences: is the student better than the plain window and given controls, and where does the teacher fail."""
    for row in rows:
        beside = row.role in (SINKS, NO_LINEAR) or is_given(row.role)
        if row.metric == "nll_difference" and beside and (not row.by or is_beyond(row)):
            yield _compared(row)
    failed = [
        f"{row.task} at {number(row.length)} ({100 * row.value:.0f} %)"
        for row in rows
        if row.role == TEACHER and row.metric == _shown(rows, row.task) and not row.by and row.value < FAILS
    ]
    if failed:
        yield f"The teacher itself fails at {', '.join(failed)}: there is little to lose there."


def _heading(role: str) -> str:
    return SHORT.get(role, role)


def called(role: str) -> str:
    """A control in a sentence about the student."""
    return "itself without its linear branch" if role == NO_LINEAR else role


def is_beyond(row: Score) -> bool:
    """Whether a score is over all that lies behind a window."""
    far = None if row.length is None else beyond(row.length)
    return far is not None and row.by == "distance" and row.bucket == name(far)


def _compared(row: Score) -> str:
    """A control's difference to the student in words."""
    other = called(row.role)
    if row.low is None or row.high is None or row.low <= 0 <= row.high:
        verdict = f"cannot be told apart from {other}"
    else:
        verdict = f"is better than {other}" if row.low > 0 else f"is WORSE than {other}"
    ends = "" if row.low is None or row.high is None else f", 95 %: {row.low:+.3f} to {row.high:+.3f}"
    where = "at recalling what lies 64 tokens back or more" if row.by else "over all tokens"
    return f"{row.model} {verdict} {where} ({row.task}, {number(row.length)}: {row.value:+.3f} nats a token{ends})."


def _text(rows: Sequence[Score], roles: Sequence[str]) -> list[Row]:
    """Over everything: perplexity, difference to the student, KL to the teacher, hits against others."""
    columns: dict[str, tuple[str, bool, Callable[[Score], Any]]] = {
        "ppl": ("ppl", False, plain),
        "nats more,\n95%": ("nll_difference", False, _interval),
        "KL": ("kl", False, plain),
        "same %": ("agreement", False, plain),
        "recalled ppl": ("ppl_hit", True, plain),
        "recalled\nmore, 95%": ("nll_difference", True, _interval),
    }
    made = []
    for role in roles:
        own = [row for row in rows if row.role == role]
        if not own:
            continue
        line: Row = {"model": label(role, rows)}
        for title, (metric, far, show) in columns.items():
            here = [row for row in own if row.metric == metric and (is_beyond(row) if far else not row.by)]
            line[title] = show(here[0]) if here else None
        made.append(line)
    return _filled(made)


def _filled(rows: Sequence[Row]) -> list[Row]:
    """Without the columns that are empty throughout."""
    kept = [key for key in rows[0] if any(row[key] is not None for row in rows)] if rows else []
    return [{key: row[key] for key in kept} for row in rows]


def _by_bucket(rows: Sequence[Score], roles: Sequence[str], metric: str, by: str) -> list[Row]:
    """A line for each bucket, a column for each role."""
    found = {
        (row.bucket, row.role): row
        for row in rows
        if row.metric == metric and row.by == by and not is_beyond(row)
    }
    buckets = sorted({bucket for bucket, _ in found}, key=lambda bucket: int(bucket.split("-")[0]))
    made = []
    for bucket in buckets:
        line: Row = {f"{by}": bucket}
        for role in roles:
            line[_heading(role)] = plain(found[bucket, role]) if (bucket, role) in found else None
        made.append(line | {"tokens": found[bucket, next(r for b, r in found if b == bucket)].n})
    return made


def _shown(rows: Sequence[Score], task: str) -> str:
    """By which metric a task's writing is shown."""
    metrics = {row.metric for row in rows if row.task == task}
    return next((metric for metric in GENERATED if metric in metrics), "")


def _recall(rows: Sequence[Score], roles: Sequence[str]) -> list[Row]:
    """Two lines for each task and length: what the model writes, and what it finds likelier than the distractors."""
    made = []
    for task, length in dict.fromkeys((row.task, row.length) for row in rows if row.metric == "choice"):
        for metric, title in ((_shown(rows, task), "written"), ("choice", "picked")):
            found = {
                row.role: row
                for row in rows
                if (row.task, row.length, row.metric, row.by) == (task, length, metric, "")
            }
            widest = max((row.high or 0) - (row.low or 0) for row in found.values()) / 2
            line: Row = {"task": f"{task} {length:,}", "by": title}
            line |= {_heading(role): plain(found[role]) if role in found else None for role in roles}
            made.append(line | {"+-": round(100 * widest)})
    return made


def _tasks(rows: Sequence[Score], roles: Sequence[str]) -> list[Row]:
    """A line for each metric of a task, and one for what of it the teacher's score has."""
    made = []
    scored = [row for row in rows if "lm-eval" in row.version]
    for task, metric, bucket in dict.fromkeys((row.task, row.metric, row.bucket) for row in scored):
        found = {
            row.role: row for row in scored if (row.task, row.metric, row.bucket) == (task, metric, bucket)
        }
        relative = metric == "relative"
        line: Row = {"task": task, "metric": f"{bucket}, of teacher's" if relative else metric}
        for role in roles:
            line[_heading(role)] = share(found[role]) if role in found else None
        made.append(line | {"items": next(iter(found.values())).n})
    return made


def share(row: Score) -> Any:
    """In percent with half its interval, where it has one; a perplexity as it is."""
    if row.low is None or row.high is None:
        return row.value
    return f"{100 * row.value:.1f} +-{50 * (row.high - row.low):.1f}"


def _plainly(rows: Sequence[Score], roles: Sequence[str], tasks: Sequence[str]) -> list[Row]:
    """A line for each metric, context and batch."""
    made = []
    here = [row for row in rows if row.task.split(":")[0] in tasks]  # behind the colon stands the text's name
    for task, metric, length, bucket in dict.fromkeys((r.task, r.metric, r.length, r.bucket) for r in here):
        line: Row = {"task": task, "metric": metric, "tokens": length, "batch": bucket or None}
        found = {
            r.role: r
            for r in here
            if (r.task, r.metric, r.length, r.bucket) == (task, metric, length, bucket)
        }
        line |= {_heading(role): plain(found[role]) for role in roles if role in found}
        made.append(line)
    present = [_heading(role) for role in roles if any(_heading(role) in line for line in made)]
    return _filled([{**line, **{role: line.get(role) for role in present}} for line in made])


def _crossovers(rows: Sequence[Score]) -> list[Row]:
    return [
        {"of": row.task, "batch": row.bucket, "tokens": int(row.value)}
        for row in rows
        if row.metric == "crossover"
    ]


def plain(row: Score) -> Any:
    """The value; a share in whole percent."""
    metric = METRICS.get(row.metric)
    if row.metric.endswith("_bytes"):
        return f"{row.value / 2**20:,.1f} MiB"
    whole = metric is not None and metric.share and math.isfinite(row.value)
    return round(100 * row.value) if whole else row.value


def _interval(row: Score) -> Any:
    return plain(row) if row.low is None or row.high is None else f"{row.low:+.2f} {row.high:+.2f}"
