"""What the scores say, in sentences with a grade: against the plain window, against each other, and their limits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from linearize.eval import summary
from linearize.eval.ablation import NO_LINEAR
from linearize.eval.cast import SINKS
from linearize.eval.page.blocks import Finding
from linearize.eval.page.contestants import Contestant, place
from linearize.eval.page.paired import difference
from linearize.eval.page.same_training import missing
from linearize.eval.page.sources import Subject
from linearize.eval.rows import STUDENT, TEACHER, Score
from linearize.eval.tables import number

GOOD, BAD, OPEN = "good", "bad", "open"
VERBS = {BAD: "is WORSE than", GOOD: "is better than", OPEN: "cannot be told apart from"}
FEW_WINDOWS = 6
"""Below so many, drawing them again underestimates how they differ."""
LOST = 1.5
"""Times its best perplexity on a text from which on a teacher no longer knows what it reads."""
MANY = 4
"""So many names or numbers are listed."""


@dataclass(frozen=True)
class _Comparison:
    """One measurement of two contestants."""

    row: Score
    """Whose task and length it is."""
    grade: str
    difference: float | None
    """Nats a token that the second has more; None where their tokens are not the same."""
    sentence: str
    """What it says by itself."""


def verdict(subjects: Sequence[Subject], cast: Sequence[Contestant]) -> tuple[Finding, list[Finding]]:
    """The headline, and the sentences that it stands on."""
    window = {subject.name: list(_beside(subject, SINKS)) for subject in subjects}
    found: list[Finding] = []
    if len(subjects) == 1:
        [subject] = subjects
        headline = _headline(subject.name, window[subject.name])
    else:
        headline, found = _between(subjects, recall_of(cast))
    for name, pairs in window.items():
        found += _twice(pairs, name, SINKS)
    for subject in subjects:  # what the recurrent state carries, which no score beside a plain window tells
        found += _twice(list(_beside(subject, NO_LINEAR)), subject.name, summary.called(NO_LINEAR))
    for subject in subjects:
        for role in dict.fromkeys(row.role for row in subject.rows if summary.is_given(row.role)):
            found += _twice(list(_beside(subject, role)), subject.name, role)
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


def beyond_teacher(cast: Sequence[Contestant]) -> list[tuple[str, int]]:
    """(task, length) of texts too long for the teacher: its perplexity is half as high again as at another."""
    found = {
        place: row.value
        for one in cast
        if one.role == TEACHER
        for place, row in texts(one.rows, TEACHER).items()
    }
    best = {task: min(value for (own, _), value in found.items() if own == task) for task, _ in found}
    return sorted(place for place, value in found.items() if not value < LOST * best[place[0]])


def listed(units: Collection[tuple[str, int]]) -> str:
    """Tasks and lengths in few words: "passkey, mqar at 512, 1,024", "13 tasks at 512 to 32,768"."""
    tasks, lengths = sorted({task for task, _ in units}), sorted({length for _, length in units})
    what = ", ".join(tasks) if len(tasks) <= MANY else f"{len(tasks)} tasks"
    few = ", ".join(f"{length:,}" for length in lengths)
    return f"{what} at {few if len(lengths) <= MANY else f'{lengths[0]:,} to {lengths[-1]:,}'}"


def recall_of(cast: Sequence[Contestant]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """What a mean of recall is over, for all means of a page: (task, length) of what teachers, students and the plain
    window write, as far as they were measured on recall at all; and what only some of them do."""
    roles = (TEACHER, STUDENT, SINKS)
    found = [made for one in cast if one.role in roles and (made := set(written(one.rows)))]
    shared = set.intersection(*found) if found else set()
    return sorted(shared), sorted(set().union(*found) - shared)


def mean_of(shared: Collection[tuple[str, int]], left: Collection[tuple[str, int]] = ()) -> str:
    """What a mean over `recall_of` is of."""
    measured = f"{len(shared)} measurements: " if len(shared) > 1 else ""
    rest = f"; not of all models, so left out: {listed(left)}" if left else ""
    return f"mean of {measured}{listed(shared)} tokens{rest}"


def _beside(subject: Subject, role: str) -> Iterator[tuple[bool, _Comparison]]:
    """(whether it is about what lies beyond a window, comparison) with a control."""
    for row in subject.rows:
        if row.role == role and row.metric == "nll_difference":
            for sentence in summary.verdicts([row]):  # none for the buckets
                yield bool(row.by), _Comparison(row, _grade(row.low, row.high), row.value, sentence)


def _twice(pairs: Sequence[tuple[bool, _Comparison]], first: str, second: str) -> Iterator[Finding]:
    """Over all tokens, and beyond a window."""
    for far, where in ((False, "over all tokens"), (True, "at recalling what lies 64 tokens back or more")):
        yield from _said([one for beyond, one in pairs if beyond is far], first, second, where)


def _said(made: Sequence[_Comparison], first: str, second: str, where: str) -> Iterator[Finding]:
    """One sentence for each grade."""
    for grade, verb in VERBS.items():
        same = [one for one in made if one.grade == grade]
        if len(same) == 1:
            yield Finding(grade, same[0].sentence)
        elif same:
            values = [one.difference for one in same if one.difference is not None]
            nats = f"; {min(values):+.3f} to {max(values):+.3f} nats a token" if values else ""
            units = listed({(one.row.task, one.row.length or 0) for one in same})
            times = f"in {len(same)} of {len(made)} measurements"
            yield Finding(grade, f"{first} {verb} {second} {where} {times} ({units}{nats}).")


def _headline(name: str, pairs: Sequence[tuple[bool, _Comparison]]) -> Finding:
    if not pairs:
        return Finding(OPEN, f"{name} has not been compared with a plain window")
    overall, far = (
        _together([one.grade for beyond, one in pairs if beyond is kind]) for kind in (False, True)
    )
    if overall == BAD and far == GOOD:
        return Finding(BAD, f"{name} is worse than a plain window over all tokens, though it recalls more")
    if BAD in (overall, far):
        where = "over all tokens" if overall == BAD else "at recalling what lies beyond it"
        return Finding(BAD, f"{name} is worse than a plain window {where}")
    if far == GOOD:
        rest = "is better over all" if overall == GOOD else "cannot be told apart from it over all tokens"
        return Finding(GOOD, f"{name} recalls more than a plain window, and {rest}")
    if overall == GOOD:
        return Finding(OPEN, f"{name} is better than a plain window, but not shown to recall more")
    return Finding(OPEN, f"{name} cannot be told apart from a plain window")


def _together(grades: Sequence[str]) -> str:
    return BAD if BAD in grades else GOOD if GOOD in grades else OPEN


def _grade(low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 0 <= high:
        return OPEN
    return GOOD if low > 0 else BAD


def _between(
    subjects: Sequence[Subject], recall: tuple[Collection[tuple[str, int]], Collection[tuple[str, int]]]
) -> tuple[Finding, list[Finding]]:
    """Each student against the next best, by the texts and by recall, as far as all of them were measured."""
    scores = [(subject, texts(subject.rows)) for subject in subjects]
    units = [unit for unit in scores[0][1] if all(unit in found for _, found in scores)]
    scores.sort(key=lambda entry: sum(_log(entry[1][unit].value) for unit in units))
    found: list[Finding] = []
    headline = Finding(OPEN, "No text was measured of all of them")
    for rank, ((first, better), (second, worse)) in enumerate(pairwise(scores)):
        made = [_compared(first, second, better[unit], worse[unit]) for unit in units]
        found += _said(made, first.name, second.name, "over all tokens")
        if made and rank == 0:
            headline = _first_of_all(first.name, second.name, {one.grade for one in made})
    shared, left = recall
    wrote = [(subject, written([r for r in subject.rows if r.role == STUDENT])) for subject in subjects]
    if shared and all(one for _, one in wrote):
        means = {s.name: sum(one[unit].value for unit in shared) / len(shared) for s, one in wrote}
        ordered = sorted(means.items(), key=lambda entry: -entry[1])
        values = ", ".join(f"{name} {100 * mean:.0f} %" for name, mean in ordered)
        found.append(Finding(OPEN, f"Recall that is written right: {values} ({mean_of(shared, left)})."))
    return headline, found


def _log(perplexity: float) -> float:
    """Of a perplexity that is none, infinity: it comes last."""
    return math.log(perplexity) if 0 < perplexity < math.inf else math.inf


def _first_of_all(first: str, second: str, grades: set[str]) -> Finding:
    if grades == {GOOD}:
        return Finding(GOOD, f"{first} is better than {second}")
    if GOOD in grades:
        rest = "is worse at others" if BAD in grades else "cannot be told apart at others"
        return Finding(OPEN, f"{first} is better than {second} at some texts and lengths, and {rest}")
    return Finding(OPEN, f"{first} and {second} cannot be told apart")


def _compared(first: Subject, second: Subject, better: Score, worse: Score) -> _Comparison:
    """Two students at one text."""
    what = f"{better.task}, {better.length:,}"
    paired = difference(first, second, better.task, better.length or 0)
    values = f"perplexity {number(better.value)} against {number(worse.value)}"
    if paired is not None:
        mean, low, high = paired
        grade = _grade(low, high)
        ends = f"{mean:+.3f} nats a token, 95 %: {low:+.3f} to {high:+.3f}"
    else:
        mean = None
        grade, ends = _unpaired(better, worse)
    sentence = f"{first.name} {VERBS[grade]} {second.name} over all tokens ({what}: {values}; {ends})."
    return _Comparison(better, grade, mean, sentence)


def _unpaired(first: Score, second: Score) -> tuple[str, str]:
    """Grade and words from the intervals of two perplexities alone."""
    if math.isfinite(first.value) and not math.isfinite(second.value):
        return GOOD, "which is no number"
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return OPEN, "without intervals"
    if first.high < second.low or second.high < first.low:
        return GOOD if first.high < second.low else BAD, "intervals apart"
    return OPEN, "intervals overlap"


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
    few = {
        (row.task, row.length): round(row.n / (row.length - 1))
        for subject in subjects
        for row in texts(subject.rows).values()
        if row.length is not None and row.length > 1 and row.n < FEW_WINDOWS * (row.length - 1)
    }
    if few:
        where = ", ".join(f"{task} at {length:,} from {windows}" for (task, length), windows in few.items())
        yield Finding(OPEN, f"Few windows, whose intervals are too narrow: {where}; measure more of them.")
    for subject in subjects:
        if missing(subject):
            yield Finding(
                OPEN,
                f"No control was trained as {subject.name} was, without surgery: what the text taught is not told from "
                "what the method did.",
            )
        if not subject.rows:
            yield Finding(OPEN, f"{subject.name} has no scores yet: `linearize eval` measures it.")
