"""Names of suites' tasks to what measures them."""

from __future__ import annotations

from collections.abc import Sequence

from linearize.errors import LinearizeError
from linearize.eval import lm_tasks
from linearize.eval.efficiency import Efficiency
from linearize.eval.measurement import Measurement
from linearize.eval.recall.measure import GENERATORS, Mqar, Retrieval
from linearize.eval.suite import Suite
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


def check(suites: Sequence[Suite]) -> None:
    """Refuse suites with a task that nothing measures.

    Raises:
        LinearizeError: naming the nearest task.
    """
    for suite in suites:
        for unit in suite.units:
            if unit.task not in TASKS:
                raise LinearizeError(
                    f"suite '{suite.name}': unknown task '{unit.task}'; {closest(unit.task, TASKS)}"
                )
