"""Suites: what is measured, as data. Each file of `eval/suites/` is one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import LinearizeError, RecipeError
from linearize.eval.cast import CONTROLS
from linearize.eval.rows import STUDENT, TEACHER
from linearize.registry import closest

FOLDER = Path(__file__).parent / "suites"
ALL = "all"
GIVEN = "control"
"""In a suite's `roles`: every control that is a checkpoint of its own, whatever its name."""
MADE = (TEACHER, STUDENT, *CONTROLS)
"""Roles of all others."""


@dataclass(frozen=True)
class Unit:
    """One measurement of one model: its rows are written together."""

    task: str
    """What is measured; see `measurement.TASKS`."""
    length: int
    """Tokens of the context."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The task's own settings."""
    roles: tuple[str, ...] = ()
    """Roles that it is measured for; () is every one."""

    def concerns(self, role: str) -> bool:
        """Whether a role takes part."""
        return not self.roles or role in self.roles or (GIVEN in self.roles and role not in MADE)


@dataclass(frozen=True)
class Takes:
    """What a task's setting can be: a whole number, or a list of them.

    Attributes:
        least: the smallest.
        several: a list, not one number.
        needed: whether a suite has to give it.
    """

    least: int = 1
    several: bool = False
    needed: bool = True

    def holds(self, value: Any) -> bool:
        """Whether a value of a suite's file is one."""
        numbers = value if self.several else [value]
        if not isinstance(numbers, list) or not numbers:
            return False
        return all(type(number) is int and self.least <= number < MOST for number in numbers)

    def __str__(self) -> str:
        what = "a list of whole numbers, each" if self.several else "a whole number,"
        return f"{what} {self.least} or more and below 2^31"


KEYS = ("about", "measure")
"""What a suite's file has."""
FORM = "`about: a line` and `measure:`, a list of {task: NAME, length: TOKENS, ...}"
Faults = Callable[[Unit], Sequence[str]]
"""What is wrong with a unit, a sentence each: what tasks there are is not known here."""
MISSPELT = 0.85
"""From how alike on a name is another one misspelt: `demo-control` is no `control`, `studnt` a `student`."""
MOST = 2**31
"""No count that anybody means."""


@dataclass(frozen=True)
class Suite:
    """A list of measurements."""

    name: str
    about: str
    units: tuple[Unit, ...]


def names() -> list[str]:
    """Names of the suites, the cheapest first."""
    order = ["quick", "standard", "long", "efficiency"]
    found = [path.stem for path in FOLDER.glob("*.yaml")]
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def load(
    name: str | Sequence[str], only: Sequence[str] = (), faults: Faults = lambda unit: ()
) -> list[Suite]:
    """The suites of one name or several, `all` being every one, in the order in which they are measured.

    Args:
        name: of suites, "all", or YAML files of the same form.
        only: keep these tasks alone; () keeps all of them.
        faults: looks at each unit, so that what it finds is told with everything else that is wrong with the file.

    Raises:
        LinearizeError: no such suite, one that is named twice, a file that is none, or a task that none of them has.
    """
    given = [name] if isinstance(name, str) else list(name)
    suites = [suite for one in given for suite in _named(one, faults)]
    twice = next((one.name for number, one in enumerate(suites) if one in suites[:number]), None)
    if twice is not None:
        raise LinearizeError(f"--suite: '{twice}' stands there twice; once is enough")
    known = {unit.task for suite in suites for unit in suite.units}
    for task in only:
        if task not in known:
            raise LinearizeError(
                f"--only: suite '{', '.join(given)}' has no task '{task}'; {closest(task, known)}"
            )
    if not only:
        return suites
    kept = [Suite(s.name, s.about, tuple(unit for unit in s.units if unit.task in only)) for s in suites]
    return [suite for suite in kept if suite.units]


def _named(name: str, faults: Faults) -> list[Suite]:
    if name.endswith((".yaml", ".yml")):
        return [_read(Path(name), faults)]
    if name == ALL or name in names():
        return [_read(FOLDER / f"{one}.yaml", faults) for one in (names() if name == ALL else [name])]
    raise LinearizeError(f"unknown suite '{name}'; {closest(name, [*names(), ALL])}")


def of_roles(suites: Sequence[Suite], roles: Sequence[str]) -> list[Suite]:
    """What suites measure of some roles alone.

    Args:
        suites: from `load`.
        roles: such as "student".

    Raises:
        LinearizeError: nothing.
    """
    made = []
    for suite in suites:
        units = [(unit, tuple(role for role in roles if unit.concerns(role))) for unit in suite.units]
        kept = tuple(replace(unit, roles=own) for unit, own in units if own)
        made += [replace(suite, units=kept)] if kept else []
    if not made:
        names = ", ".join(suite.name for suite in suites)
        raise LinearizeError(f"--roles: nothing in suite '{names}' is measured of {', '.join(roles)}")
    return made


def role_problems(unit: Unit, given: Sequence[str]) -> list[str]:
    """Roles that a suite's file misspells: they would be measured of nobody, and the others as if all were well.

    Args:
        unit: as the file has it.
        given: names of further checkpoints.

    Returns:
        A sentence for each that nobody has and whose name is near to one. Others may be controls of another call.
    """
    known = [*MADE, GIVEN, *given]
    meant = {
        role: difflib.get_close_matches(role, known, n=1, cutoff=MISSPELT)
        for role in unit.roles
        if role not in known
    }
    return [f"no role '{role}'; did you mean '{near[0]}'?" for role, near in meant.items() if near]


def _read(path: Path, faults: Faults) -> Suite:
    """A suite's file.

    Raises:
        LinearizeError: it is missing, is no YAML, or its form is another: everything that is wrong, each with its line.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        twice = (
            list(_twice(node)) if isinstance(node, yaml.MappingNode) else []
        )  # `<<` adds keys in construction
        found = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise LinearizeError(f"--suite: cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        where = " ".join(str(error).split())[:200]  # with line and column
        raise LinearizeError(f"--suite: {path} is no YAML ({where})") from error
    if not isinstance(found, dict):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise LinearizeError(f"--suite: {path} is no suite (it holds {what}); a suite holds {FORM}")
    problems = [*twice, *(f"'{key}': {closest(str(key), KEYS)}" for key in found if key not in KEYS)]
    problems += [f"it has no '{key}'; a suite holds {FORM}" for key in KEYS if key not in found]
    entries = found.get("measure", [])
    if not isinstance(entries, list):
        problems.append(f"measure must be a list of {{task: NAME, length: TOKENS, ...}}, got {entries!r:.60}")
        entries = []
    elif "measure" in found and not entries:
        problems.append("it measures nothing")
    units: list[Unit] = []
    places: list[int] = []
    for line, entry in zip(_lines(node), entries, strict=False):
        told: dict[str, None] = {}  # a task at several lengths has its faults once
        for unit in _units(entry, told):
            if unit in units:
                before = places[units.index(unit)]
                told[
                    f"{unit.task} at {unit.length} tokens stands there twice (line {before}); once is enough"
                ] = None
            else:
                units.append(unit)
                places.append(line)
                told |= dict.fromkeys(faults(unit))
        problems += [f"line {line}: {problem}" for problem in told]
    if problems:
        raise RecipeError(problems, f"--suite: {path}")
    return Suite(path.stem, str(found["about"]), tuple(units))


def _twice(node: yaml.MappingNode) -> Iterator[str]:
    """Keys that a mapping of the file has twice, of which YAML keeps the last in silence."""
    entries = next((value for key, value in node.value if key.value == "measure"), None)
    inner = entries.value if isinstance(entries, yaml.SequenceNode) else []
    for mapping in [node, *(entry for entry in inner if isinstance(entry, yaml.MappingNode))]:
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if str(key.value) in lines:
                yield f"line {line}: '{key.value}' stands twice, first in line {lines[key.value]}; keep one of them"
            lines.setdefault(str(key.value), line)


def _lines(node: Any) -> list[int]:
    """Of each entry of `measure`, the last where the key stands twice."""
    lists = [value for key, value in node.value if key.value == "measure"][-1:]
    return [
        entry.start_mark.line + 1
        for entries in lists
        if isinstance(entries, yaml.SequenceNode)
        for entry in entries.value
    ]


def _units(entry: Any, problems: dict[str, None]) -> Iterator[Unit]:
    """One for each task and length of an entry; what is wrong with its form goes into `problems`, as its keys."""
    if not isinstance(entry, dict):
        problems[f"an entry is {{task: NAME, length: TOKENS, ...}}, got {entry!r:.60}"] = None
        return
    settings = dict(entry)
    tasks, lengths = settings.pop("task", None), settings.pop("length", 0)
    roles = settings.pop("roles", [])
    roles = [roles] if isinstance(roles, str) else roles
    tasks = tasks if isinstance(tasks, list) else [tasks]
    lengths = lengths if isinstance(lengths, list) else [lengths]
    if not tasks or not all(isinstance(task, str) for task in tasks):
        nearest = "" if "task" in entry else " under `task`"
        problems[f"an entry names a task, or a list of them{nearest}, got {entry.get('task')!r:.60}"] = None
        tasks = []
    if not lengths or not all(type(length) is int and length >= 0 for length in lengths):
        problems[f"length must be a whole number, or a list of them, got {entry.get('length')!r:.60}"] = None
        lengths = []
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        problems[f"roles must be a list of names, got {roles!r:.60}"] = None
        roles = []
    for task in tasks:
        for length in lengths:
            yield Unit(task, length, settings, tuple(roles))
