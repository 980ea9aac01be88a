"""What the scores say, in sentences with a grade: against the plain window, against each other, and their limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from linearize.eval import summary
from linearize.eval.cast import SINKS
from linearize.eval.page.blocks import Finding
from linearize.eval.page.contestants import Contestant, place
from linearize.eval.page.paired import difference
from linearize.eval.page.sources import Subject
from linearize.eval.rows import STUDENT, TEACHER, Score
from linearize.eval.tables import number

GOOD, BAD, OPEN = "good", "bad", "open"


def verdict(subjects: Sequence[Subject], cast: Sequence[Contestant]) -> tuple[Finding, list[Finding]]:
    """The headline, and the sentences that it stands on."""
    against_window = [(subject, list(_window(subject))) for subject in subjects]
    found = [finding for _, rows in against_window for _, finding in rows]
    if len(subjects) == 1:
        [(subject, rows)] = against_window
        headline = _headline(subject.name, rows)
    else:
        between = list(_between(subjects))
        headline = between[0] if between else Finding(OPEN, "Nothing was measured of all of them")
        headline = replace(headline, text=headline.text.rstrip("."))
        found = [*(replace(one, text=f"{one.text.rstrip('.')}.") for one in between[1:]), *found]
    for one in cast:
        if one.role == TEACHER:
            found += [Finding(OPEN, sentence) for sentence in summary.verdicts(one.rows)]
    return headline, [*found, *_caveats(subjects)]


def written(rows: Sequence[Score]) -> dict[tuple[str, int], Score]:
    """(task, length) -> what a model writes in a recall task, over all of its items."""
    recall = {row.task for row in rows if row.metric == "choice"}
    made: dict[tuple[str, int], Score] = {}
    for metric in reversed(summary.GENERATED):
        for row in rows:
            if row.task in recall and row.metric == metric and not row.by and row.length is not None:
                made[row.task, row.length] = row  # the first of GENERATED wins
    return made


def texts(rows: Sequence[Score], role: str = STUDENT) -> dict[tuple[str, int], Score]:
    """(task, length) -> perplexity over everything."""
    return {
        (row.task, row.length or 0): row
        for row in rows
        if row.role == role and row.metric == "ppl" and not row.by and summary.is_text(row)
    }


def _window(subject: Subject) -> Iterator[tuple[bool, Finding]]:
    """(whether it is about what lies beyond a window, sentence) for each comparison with the plain window."""
    for row in subject.rows:
        if row.role == SINKS and row.metric == "nll_difference":
            for sentence in summary.verdicts([row]):  # none for the buckets
                yield bool(row.by), Finding(_grade(row.low, row.high), sentence)


def _headline(name: str, rows: Sequence[tuple[bool, Finding]]) -> Finding:
    if not rows:
        return Finding(OPEN, f"{name} has not been compared with a plain window")
    overall, far = (_together([f.grade for beyond, f in rows if beyond is kind]) for kind in (False, True))
    if overall == BAD and far == GOOD:
        return Finding(BAD, f"{name} is worse than a plain window over all tokens, though it recalls more")
    if BAD in (overall, far):
        place = "over all tokens" if overall == BAD else "at recalling what lies beyond it"
        return Finding(BAD, f"{name} is worse than a plain window {place}")
    if far == GOOD:
        rest = (
            "and is better over all"
            if overall == GOOD
            else "and cannot be told apart from it over all tokens"
        )
        return Finding(GOOD, f"{name} recalls more than a plain window, {rest}")
    if overall == GOOD:
        return Finding(OPEN, f"{name} is better than a plain window, but not shown to recall more")
    return Finding(OPEN, f"{name} cannot be told apart from a plain window")


def _together(grades: Sequence[str]) -> str:
    return BAD if BAD in grades else GOOD if GOOD in grades else OPEN


def _grade(low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 0 <= high:
        return OPEN
    return GOOD if low > 0 else BAD


def _between(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """The students in order, by each text and by recall, as far as all of them were measured."""
    scores = [(subject, texts(subject.rows)) for subject in subjects]
    for unit in [unit for unit in scores[0][1] if all(unit in found for _, found in scores)]:
        ordered = sorted(scores, key=lambda entry: entry[1][unit].value)
        for (first, better), (second, worse) in pairwise(ordered):
            yield _ordered(first, second, better[unit], worse[unit])
    recall = [(subject, written([r for r in subject.rows if r.role == STUDENT])) for subject in subjects]
    units = [unit for unit in recall[0][1] if all(unit in found for _, found in recall)]
    if units:
        means = {s.name: sum(found[unit].value for unit in units) / len(units) for s, found in recall}
        listed = ", ".join(
            f"{name} {100 * mean:.0f} %" for name, mean in sorted(means.items(), key=lambda m: -m[1])
        )
        tasks = ", ".join(dict.fromkeys(task for task, _ in units))
        at = ", ".join(f"{length:,}" for length in sorted({length for _, length in units}))
        yield Finding(OPEN, f"Recall that is written right, mean of {tasks} at {at} tokens: {listed}.")


def _ordered(first: Subject, second: Subject, better: Score, worse: Score) -> Finding:
    """Two neighbours of a ranking by perplexity."""
    what = f"{better.task}, {better.length:,}"
    paired = difference(first, second, better.task, better.length or 0)
    values = f"perplexity {number(better.value)} against {number(worse.value)}"
    if paired is not None:
        mean, low, high = paired
        ends = f"{mean:+.3f} nats a token, 95 %: {low:+.3f} to {high:+.3f}"
        if low > 0:
            return Finding(GOOD, f"{first.name} is better than {second.name} ({what}: {values}, {ends})")
        return Finding(
            OPEN, f"{first.name} cannot be told apart from {second.name} ({what}: {values}, {ends})"
        )
    if better.high is not None and worse.low is not None and better.high < worse.low:
        return Finding(GOOD, f"{first.name} is better than {second.name} ({what}: {values}; intervals apart)")
    text = f"{first.name} cannot be told apart from {second.name} ({what}: {values}; intervals overlap)"
    return Finding(OPEN, text)


def _caveats(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """What was not measured alike."""
    seen: dict[tuple[object, ...], set[tuple[object, ...]]] = {}
    for subject in subjects:
        for row in subject.rows:
            if row.role == STUDENT and not row.by:
                seen.setdefault(place(row), set()).add((row.seed, row.n))
    unlike = dict.fromkeys(str(where[0]) for where, ways in seen.items() if len(ways) > 1)
    if unlike:
        yield Finding(
            OPEN, f"Not the same items or seeds: {', '.join(unlike)}; measure them alike to compare."
        )
    versions = dict.fromkeys(row.version.split(",")[0] for s in subjects for row in s.rows if row.version)
    if len(versions) > 1:
        yield Finding(OPEN, f"Scored by different versions: {', '.join(versions)}.")
    for subject in subjects:
        if not subject.rows:
            yield Finding(OPEN, f"{subject.name} has no scores yet: `linearize eval` measures it.")
