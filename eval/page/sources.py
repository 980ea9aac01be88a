"""What a path given to `linearize compare` holds: scores, written samples, and what a run's training logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError
from linearize.eval.report import Run, read_run
from linearize.eval.rows import STUDENT, TEACHER, Score, Scores
from linearize.eval.writing import SAMPLES

FILE = "results.json"
REMEDY = "compare reads what `linearize eval` wrote; measure again with that into another --out"
"""Where a file is damaged, or is somebody else's."""


@dataclass(frozen=True)
class Written:
    """Continuations of one model."""

    role: str
    prompts: Sequence[str]
    texts: Sequence[str]


@dataclass(frozen=True)
class Subject:
    """One of the things that are compared.

    Attributes:
        name: what the page calls it, no other subject's name.
        rows: every score of its results.json.
        written: of the measurements in `rows`.
        run: what its training logged; None for a model that no run made, or whose run is elsewhere.
        folder: of its results.json.
    """

    name: str
    rows: Sequence[Score]
    written: Sequence[Written] = ()
    run: Run | None = None
    folder: Path = field(default_factory=Path)


def read(paths: Sequence[str | Path]) -> list[Subject]:
    """Run folders, their `checkpoint` or `eval` folders, folders that `linearize eval --out` wrote, results.json files.

    A folder or file that no run made, and that holds scores of several students, is as many subjects.

    Raises:
        LinearizeError: nothing is there, or nothing was measured and nothing trained.
        CheckpointError: a results.json is damaged.
    """
    found = [_shown(subject) for path in paths for subject in _students(_read(Path(path)))]
    names = [subject.name for subject in found]
    made = []
    for number, subject in enumerate(found, 1):
        # two folders of one name stay apart
        name = subject.name if names.count(subject.name) == 1 else f"{subject.name} ({number})"
        rows = [row if row.role == TEACHER else replace(row, model=name) for row in subject.rows]
        made.append(replace(subject, name=name, rows=rows))
    return made


def _students(subject: Subject) -> list[Subject]:
    """One for each; what was measured of one must not stand under the other's name."""
    names = dict.fromkeys(row.model for row in subject.rows if row.role == STUDENT)
    if subject.run is not None or len(names) < 2:
        return [_whole(subject)]
    made = []
    for name in names:
        rows = [row for row in subject.rows if row.role == TEACHER or row.model == name]
        made.append(_whole(replace(subject, name=name, rows=rows)))
    return made


def _whole(subject: Subject) -> Subject:
    """With the latest rows alone, and what was written in their measurements."""
    rows = _latest(subject.rows)
    return replace(subject, rows=rows, written=_written(subject.folder, rows))


def _shown(subject: Subject) -> Subject:
    """With names of one line that move no cursor: a terminal obeys what stands in them."""
    rows = [replace(row, model=_line(row.model), task=_line(row.task)) for row in subject.rows]
    return replace(subject, name=_line(subject.name) or "model", rows=rows)


def _line(name: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(name.split()))


def _read(path: Path) -> Subject:
    if not path.exists():
        raise LinearizeError(f"compare: no file or folder at '{path}'; give run folders, or what eval wrote")
    folder = path.parent if path.is_file() else path
    if folder.name in ("checkpoint", "eval") and (folder.parent / "recipe.yaml").is_file():
        folder = folder.parent
    run = read_run(folder) if (folder / "recipe.yaml").is_file() else None
    file = folder / "eval" / FILE if run is not None else path if path.is_file() else folder / FILE
    if run is None and not file.is_file():
        raise LinearizeError(
            f"compare: '{path}' is no run folder and holds no {FILE}; `linearize eval {path}` measures a model and "
            "says where its scores are"
        )
    rows = Scores(file, REMEDY).rows
    if run is not None and not rows and not run.metrics and not run.rows:
        raise LinearizeError(
            f"compare: the run in '{folder}' has logged nothing yet; go on with it, or `linearize eval` it"
        )
    name = folder.name or str(folder)
    if run is None:
        name = next((row.model for row in rows if row.role == STUDENT), name)
    return Subject(name, rows, run=run, folder=file.parent)


def _latest(rows: Sequence[Score]) -> list[Score]:
    """Of what was measured twice (another version, other settings) the later measurement, and that one whole."""
    last = {(row.role, row.task, row.length): row.key for row in rows}
    return [row for row in rows if last[row.role, row.task, row.length] == row.key]


def _written(folder: Path, rows: Sequence[Score]) -> list[Written]:
    made = []
    for key in dict.fromkeys(row.key for row in rows if row.task.split(":")[0] == "generation"):
        try:
            found: Any = json.loads((folder / SAMPLES / f"{key}.json").read_text(encoding="utf-8"))
            lists = [[str(text) for text in found[part]] for part in ("prompts", "texts")]
            made.append(Written(str(found["role"]), *lists))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # somebody deleted them; the scores stand without
    return made
