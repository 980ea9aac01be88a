"""What each conversion owes to its parts: the same measurement with a branch off, untrained, or without a mixer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from linearize.eval import summary
from linearize.eval.cast import CONTROLS
from linearize.eval.page.blocks import Bar, Bars, Block, Row, Style, Table, Words
from linearize.eval.page.contestants import CONTROL_STYLES, STUDENT_COLORS, TEACHER_STYLE
from linearize.eval.page.sources import Subject
from linearize.eval.page.verdict import listed, written
from linearize.eval.rows import STUDENT, TEACHER, Score


def blocks(subjects: Sequence[Subject]) -> Iterator[Block]:
    """For each conversion and its controls: perplexity of text, of pairs that lie beyond a window, and recall."""
    rows: list[Row] = []
    for subject in subjects:
        roles = sorted(dict.fromkeys(row.role for row in subject.rows), key=_order)
        if STUDENT not in roles or len(roles) < 2:
            continue
        several = f"{subject.name}: " if len(subjects) > 1 else ""
        for unit in dict(shown_texts(subject.rows)[::-1]).items():  # the first of each text
            here = [row for row in subject.rows if (row.task, row.length) == unit]
            where = f"{unit[0]}, {unit[1]:,} tokens"
            for title, wanted in (("Perplexity", "ppl"), ("Perplexity of pairs beyond 64 tokens", "ppl_hit")):
                shown = [row for row in here if row.metric == wanted and _counts(row)]
                if len(shown) > 1:
                    shown.sort(key=lambda row: _order(row.role))
                    bars = [_bar(row, subject) for row in shown]
                    yield Bars(f"{several}{title} ({where})", "perplexity", bars, log=True)
            rows += _differences(here, subject)
        recall = [(role, written([r for r in subject.rows if r.role == role])) for role in roles]
        shared = sorted(set.intersection(*(set(found) for _, found in recall if found), set(recall[0][1])))
        if shared:
            bars = []
            for role, found in recall:
                if found:
                    mean = 100 * sum(found[place].value for place in shared) / len(shared)
                    only = found[shared[0]] if len(shared) == 1 else None
                    low, high = (
                        (None, None)
                        if only is None or only.low is None or only.high is None
                        else (100 * only.low, 100 * only.high)
                    )
                    bars.append(Bar(_name(role, subject), mean, low, high, _style(role)))
            yield Bars(f"{several}Recall written right ({listed(shared)})", "% of items", bars, share=True)
    if rows:
        yield Table(rows, "Nats a token more than the conversion itself, over the same tokens")
        yield Words(
            "A control whose interval lies above 0 is worse than the conversion. If swa_sinks or the model with its "
            "linear branch off is no worse, the window alone does the work."
        )


def shown_texts(rows: Sequence[Score]) -> list[tuple[str, int]]:
    """Of each text the windows that most models were measured on, and the longest of all: the others say the same."""
    models: dict[tuple[str, int], set[tuple[str, str]]] = {}
    for row in rows:
        if summary.is_text(row) and row.metric == "ppl" and row.length is not None:
            models.setdefault((row.task, row.length), set()).add((row.model, row.role))
    made: list[tuple[str, int]] = []
    for task in dict.fromkeys(task for task, _ in models):
        own = [unit for unit in models if unit[0] == task]
        shared = max(own, key=lambda unit: (len(models[unit]), unit[1]))
        made += dict.fromkeys([shared, max(own, key=lambda unit: unit[1])])
    return made


def _counts(row: Score) -> bool:
    return summary.is_beyond(row) if row.metric == "ppl_hit" else not row.by


def _differences(rows: Sequence[Score], subject: Subject) -> Iterator[Row]:
    for row in rows:
        if row.metric == "nll_difference" and (not row.by or summary.is_beyond(row)):
            known = row.low is not None and row.high is not None
            yield {
                "conversion": subject.name,
                "control": row.role,
                "of": row.task,
                "over": "pairs repeated from 64 tokens back or more" if row.by else "all tokens",
                "windows": f"{row.length:,}",
                "difference": f"{row.value:+.3f}",
                "95 %": f"{row.low:+.3f} to {row.high:+.3f}" if known else None,
            }


def _bar(row: Score, subject: Subject) -> Bar:
    return Bar(_name(row.role, subject), row.value, row.low, row.high, _style(row.role))


def _name(role: str, subject: Subject) -> str:
    return subject.name if role == STUDENT else role


def _order(role: str) -> int:
    """Teacher, conversion, the controls as eval has them, any others."""
    known = [TEACHER, STUDENT, *CONTROLS]
    return known.index(role) if role in known else len(known)


def _style(role: str) -> Style:
    if role == TEACHER:
        return TEACHER_STYLE
    return Style(STUDENT_COLORS[0]) if role == STUDENT else CONTROL_STYLES.get(role, Style("#56B4E9"))
