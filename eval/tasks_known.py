"""Names of suites' tasks to what measures them."""

from __future__ import annotations

from collections.abc import Sequence

from linearize.errors import LinearizeError
from linearize.eval import lm_tasks
from linearize.eval.efficiency import Efficiency
from linearize.eval.measurement import Measurement
from linearize.eval.recall.measure import GENERATORS, Mqar, Retrieval
from linearize.eval.suite import Suite, Unit
from linearize.eval.text import Text
from linearize.eval.writing import Decoding, Writing
from linearize.registry import closest

TASKS: dict[str, Measurement] = {
    "text": Text(),
    "mqar": Mqar(),
    "decoding": Decoding(),
    "generation": Writing(),
    **{name: Efficiency(name) for name in ("prefill", "decode")},
    lm_tasks.TASK: lm_tasks.LmTasks(),
    **{name: Retrieval(name) for name in GENERATORS},
}

NAMED = [name for name in TASKS if name != lm_tasks.TASK]
"""Those that a suite's file can name."""


def check(suites: Sequence[Suite]) -> None:
    """Refuse suites with a task that nothing measures, or with settings that the task does not take.

    Raises:
        LinearizeError: naming the nearest task or setting, or what the setting can be.
    """
    for suite in suites:
        for unit in suite.units:
            if unit.task not in TASKS:
                raise LinearizeError(
                    f"suite '{suite.name}': unknown task '{unit.task}'; {closest(unit.task, NAMED)}"
                )
            if unit.task != lm_tasks.TASK:
                _check_settings(f"suite '{suite.name}': {unit.task}", unit)
            elif "name" not in unit.settings:
                raise LinearizeError(f"suite '{suite.name}': tasks of lm-eval are named with --tasks A,B")


def _check_settings(where: str, unit: Unit) -> None:
    takes = TASKS[unit.task].takes
    given = {**unit.settings, "length": unit.length}
    for name, value in given.items():
        if name not in takes:
            raise LinearizeError(f"{where} has no setting '{name}'; {closest(str(name), [*takes, 'roles'])}")
        if not takes[name].holds(value):
            raise LinearizeError(f"{where}: {name} must be {takes[name]}, got {value!r:.60}")
    missing = [name for name, one in takes.items() if one.needed and name not in given]
    if missing:
        raise LinearizeError(f"{where} needs {', '.join(missing)}: {missing[0]} is {takes[missing[0]]}")
