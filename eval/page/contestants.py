"""Who stands in the charts: each subject's student, each teacher once, and the controls of every subject."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from linearize.eval.ablation import NO_LINEAR, NO_WINDOW
from linearize.eval.cast import CONTROLS, SINKS, UNTRAINED
from linearize.eval.page.blocks import Style
from linearize.eval.page.sources import Subject, Written
from linearize.eval.plots import COLORS
from linearize.eval.rows import STUDENT, TEACHER, Score

CONTROL_STYLES = {
    SINKS: Style("#D55E00", "dash", "square"),
    NO_LINEAR: Style("#009E73", "dot", "diamond"),
    NO_WINDOW: Style("#CC79A7", "dot", "triangle-up"),
    UNTRAINED: Style("#E69F00", "dot", "x"),
}
TEACHER_STYLE = Style("#000000", "dash", "cross")
STUDENT_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00")
LONGEST = 28
"""Characters of a name in a chart; tables have all of them."""


@dataclass(frozen=True)
class Contestant:
    """One line of the charts.

    Attributes:
        name: shown; unique on the page.
        role: as in the rows.
        subjects: names of the subjects that it belongs to; a teacher may have several.
        main: whether it stands in the charts of quality and cost, not only among the controls.
    """

    name: str
    role: str
    subjects: tuple[str, ...]
    rows: Sequence[Score]
    style: Style
    main: bool
    written: Sequence[Written] = ()


def contestants(subjects: Sequence[Subject]) -> list[Contestant]:
    """Teachers, students, then controls.

    With one subject every control is in all charts. With several, only the window without training is, and checkpoints
    that were given as controls: what a branch does is a question about one conversion, and has a section of its own.
    """
    alone = len(subjects) == 1
    made = [*_shared(subjects, TEACHER, alone)]
    for number, subject in enumerate(subjects):
        rows = [row for row in subject.rows if row.role == STUDENT]
        if rows:
            style = Style(
                STUDENT_COLORS[number % len(STUDENT_COLORS)],
                "solid" if number < len(STUDENT_COLORS) else "dot",
            )
            written = [one for one in subject.written if one.role == STUDENT]
            made.append(Contestant(subject.name, STUDENT, (subject.name,), rows, style, True, written))
    made += _shared(subjects, SINKS, alone)
    made += _given(subjects, alone)
    for subject in subjects:
        others = [row.role for row in subject.rows if row.role in CONTROLS and row.role != SINKS]
        for role in dict.fromkeys(others):
            name = role if alone else f"{subject.name}: {role}"
            rows = [row for row in subject.rows if row.role == role]
            written = [one for one in subject.written if one.role == role]
            made.append(Contestant(name, role, (subject.name,), rows, CONTROL_STYLES[role], alone, written))
    return made


def short(name: str) -> str:
    """A name that fits beside a chart."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 9]}…{line[-8:]}"


def _shared(subjects: Sequence[Subject], role: str, alone: bool) -> Iterator[Contestant]:
    """What depends on the teacher alone stands once for each teacher, with all that any subject measured of it."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        own = [row for row in subject.rows if row.role == role]
        if own:
            teacher = next((row.model for row in subject.rows if row.role == TEACHER), own[0].model)
            groups.setdefault(teacher, []).append(subject)
    for teacher, members in groups.items():
        merged: dict[tuple[object, ...], Score] = {}
        for subject in members:
            for row in subject.rows:
                if row.role == role:
                    merged.setdefault(place(row), row)
        if role == TEACHER:
            name, style = f"{teacher} (teacher)", TEACHER_STYLE
        else:
            name = role if len(groups) == 1 else f"{role} of {teacher}"
            style = CONTROL_STYLES[SINKS]
        written = [one for one in members[0].written if one.role == role]
        rows = [row for row in merged.values() if alone or row.metric != "nll_difference"]
        yield Contestant(name, role, tuple(one.name for one in members), rows, style, True, written)


def _given(subjects: Sequence[Subject], alone: bool) -> Iterator[Contestant]:
    """Checkpoints that were given as controls; one that several subjects were judged beside, by its scores, once."""
    groups: list[tuple[str, list[Subject], dict[tuple[object, ...], Score]]] = []
    for subject in subjects:
        known = (TEACHER, STUDENT, *CONTROLS)
        for role in dict.fromkeys(row.role for row in subject.rows if row.role not in known):
            own = {place(row): row for row in subject.rows if row.role == role}
            same = next((group for group in groups if group[0] == role and _agree(group[2], own)), None)
            if same is None:
                groups.append((role, [subject], own))
            else:
                same[1].append(subject)
                same[2].update({where: row for where, row in own.items() if where not in same[2]})
    roles = [role for role, _, _ in groups]
    for number, (role, members, merged) in enumerate(groups):
        name = role if roles.count(role) == 1 else f"{members[0].name}: {role}"
        rows = [row for row in merged.values() if alone or row.metric != "nll_difference"]
        style = Style(COLORS[(number + 2) % len(COLORS)], "dot", "star")
        written = [one for one in members[0].written if one.role == role]
        yield Contestant(name, role, tuple(one.name for one in members), rows, style, True, written)


def _agree(one: Mapping[tuple[object, ...], Score], other: Mapping[tuple[object, ...], Score]) -> bool:
    """Whether scores of a model alone are the same, to the rounding of another batch size."""
    pairs = [(one[where], row) for where, row in other.items() if where in one and not row.against]
    return bool(pairs) and all(math.isclose(a.value, b.value, rel_tol=2e-3, abs_tol=1e-9) for a, b in pairs)


def place(row: Score) -> tuple[object, ...]:
    """What is measured, whoever it is measured of."""
    return row.task, row.metric, row.length, row.by, row.bucket, row.against
