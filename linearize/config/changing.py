"""What changes within a stage, held against the stage: every part is reached, and lengths fit into each other."""

from __future__ import annotations

from typing import Any

from linearize.config.course import Course
from linearize.config.schedule import Over
from linearize.config.schema import StageConfig


def changing(path: str, stage: StageConfig) -> dict[str, Over]:
    """Dotted key -> value of what a stage may change as it goes on, where the stage has it."""
    found: dict[str, Any] = {
        f"{path}.batch_size": stage.batch_size,
        f"{path}.window_dropout": stage.window_dropout,
    }
    if stage.data is not None and stage.data.length is not None:
        found[f"{path}.data.length"] = stage.data.length
    if not isinstance(stage.lr_schedule, str):
        found[f"{path}.lr_schedule"] = stage.lr_schedule
    return {key: Over.of(value) for key, value in found.items()}


def part_problems(path: str, stage: StageConfig, length: int) -> list[str]:
    """What of a stage's values cannot be as written, one sentence each.

    Args:
        path: dotted key of the stage.
        stage: its tokens hold one step at least.
        length: of its sequences, where the stage has none of its own.
    """
    steps = Course.of(stage, length).steps
    values = changing(path, stage)
    found = [
        f"{key}: a part begins at step {int(over.starts[-1])}, and the stage has {steps} steps; begin earlier, give "
        "more tokens, or give shares of the stage (from 0 to below 1)"
        for key, over in values.items()
        if over.by_step and over.starts[-1] >= steps
    ]
    lengths = values.get(f"{path}.data.length")
    if lengths is not None:
        odd = [value for value in lengths.values if lengths.most % value]
        found += [
            f"{path}.data.length: {value} does not divide {lengths.most}, the longest, into which text is packed "
            f"before it is cut; take {_divisor(lengths.most, int(value))}"
            for value in dict.fromkeys(odd)
        ]
    return found


def _divisor(whole: int, near: int) -> int:
    """The largest divisor of `whole` up to `near`."""
    return next(number for number in range(near, 0, -1) if whole % number == 0)
