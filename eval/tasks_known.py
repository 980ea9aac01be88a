"""Names of suites' tasks to what measures them."""

from __future__ import annotations

from linearize.eval import lm_tasks
from linearize.eval.efficiency import Efficiency
from linearize.eval.measurement import Measurement
from linearize.eval.recall.measure import GENERATORS, Mqar, Retrieval
from linearize.eval.suite import Unit
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


def problems(unit: Unit) -> list[str]:
    """What is wrong with an entry of a suite: a task that nothing measures, settings that the task does not take.

    Args:
        unit: as the file has it.

    Returns:
        A sentence each, naming the nearest task or setting, or what the setting can be.
    """
    if unit.task == lm_tasks.TASK:
        return ["tasks of lm-eval are named with --tasks A,B"]
    if unit.task not in TASKS:
        return [f"unknown task '{unit.task}'; {closest(unit.task, NAMED)}"]
    takes = TASKS[unit.task].takes
    given = {**unit.settings, "length": unit.length}
    found = []
    for name, value in given.items():
        if name not in takes:
            found.append(f"{unit.task} has no setting '{name}'; {closest(str(name), [*takes, 'roles'])}")
        elif not takes[name].holds(value):
            found.append(f"{unit.task}: {name} must be {takes[name]}, got {value!r:.60}")
    missing = [name for name, one in takes.items() if one.needed and name not in given]
    return [*found, *(f"{unit.task} needs {name}: {takes[name]}" for name in missing)]
