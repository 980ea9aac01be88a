"""Suites: what is measured, as data. Each file of `eval/suites/` is one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import LinearizeError
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


def load(name: str | Sequence[str], only: Sequence[str] = ()) -> list[Suite]:
    """The suites of one name or several, `all` being every one, in the order in which they are measured.

    Args:
        name: of suites, "all", or YAML files of the same form.
        only: keep these tasks alone; () keeps all of them.

    Raises:
        LinearizeError: no such suite, one that is named twice, a file that is none, or a task that none of them has.
    """
    given = [name] if isinstance(name, str) else list(name)
    suites = [suite for one in given for suite in _named(one)]
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


def _named(name: str) -> list[Suite]:
    if name.endswith((".yaml", ".yml")):
        return [_read(Path(name))]
    if name == ALL or name in names():
        return [_read(FOLDER / f"{one}.yaml") for one in (names() if name == ALL else [name])]
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


def check_roles(suites: Sequence[Suite], given: Sequence[str]) -> None:
    """Refuse a role that a suite's file misspells: it would be measured of nobody, and the others as if all were well.

    Args:
        suites: from `load`.
        given: names of further checkpoints.

    Raises:
        LinearizeError: a role that nobody has and whose name is near to one. Others may be controls of another call.
    """
    known = [*MADE, GIVEN, *given]
    for suite in suites:
        for role in dict.fromkeys(role for unit in suite.units for role in unit.roles if role not in known):
            if near := difflib.get_close_matches(role, known, n=1, cutoff=MISSPELT):
                raise LinearizeError(f"suite '{suite.name}': no role '{role}'; did you mean '{near[0]}'?")


def _read(path: Path) -> Suite:
    """A suite's file.

    Raises:
        LinearizeError: it is missing, or its form is another.
    """
    form = "`about: a line` and `measure:`, a list of {task: NAME, length: TOKENS, ...}"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {'nothing' if found is None else f'a {type(found).__name__}'}")
        for key in found:
            if key not in KEYS:
                raise ValueError(f"'{key}': {closest(str(key), KEYS)}")
        for key in KEYS:
            if key not in found:
                raise ValueError(f"it has no '{key}'")
        entries, about = list(found["measure"]), str(found["about"])
        units = tuple(unit for entry in entries for unit in _units(dict(entry)))
        if not units:
            raise ValueError("it measures nothing")
    except OSError as error:
        raise LinearizeError(f"--suite: cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise LinearizeError(f"--suite: {path} is no YAML: {str(error).splitlines()[0]}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise LinearizeError(f"--suite: {path} is no suite ({error}); it holds {form}") from error
    return Suite(path.stem, about, units)


def _units(settings: dict[str, Any]) -> Iterator[Unit]:
    """One for each task and length of an entry."""
    tasks, lengths = settings.pop("task"), settings.pop("length", 0)
    roles = settings.pop("roles", [])
    roles = [roles] if isinstance(roles, str) else roles
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise ValueError(f"roles {roles}")
    for task in [tasks] if isinstance(tasks, str) else tasks:
        for length in [lengths] if isinstance(lengths, int) else lengths:
            if not isinstance(task, str) or type(length) is not int or length < 0:
                raise ValueError(f"task {task}, length {length}")
            yield Unit(task, length, settings, tuple(roles))
