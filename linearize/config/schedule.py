"""A value over a stage: one number, or numbers that follow each other. One grammar for every field that takes it.

0.5                            the same all along
[0.9, 0.75, 0.5]               equal parts of the stage
[[0, 0.9], [0.5, 0.5]]         from where, value: a share of the stage's tokens, from 0 to below 1,
[[0, 0.9], [200, 0.5]]         or a step, a whole number from 1 on; the first part begins at 0
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from linearize.config.values import as_number, as_whole, shown

FORMS = "a number, a list of numbers for equal parts of the stage, or a list of [from, value]"
MOST = 100
"""Parts of a stage at most."""


def read(value: Any, kind: type, path: str, problems: list[str]) -> Any:
    """The value with its numbers as numbers, or None after writing down what is wrong.

    Args:
        value: as a recipe has it.
        kind: int or float, of the values.
        path: dotted key.
        problems: receives one sentence for each mistake.
    """
    convert = as_whole if kind is int else as_number
    what = "a whole number (20M and 500k work)" if kind is int else "a number"
    if not isinstance(value, (list, tuple)):
        number = convert(value)
        if number is None:
            problems.append(f"{path}: must be {what}, got {shown(value)}")
        return None if number is None else kind(number)
    if not 0 < len(value) <= MOST:
        problems.append(f"{path}: {len(value)} parts; give 1 to {MOST}, as {FORMS}")
        return None
    paired = [isinstance(part, (list, tuple)) for part in value]
    if any(paired) and not all(part and len(item) == 2 for part, item in zip(paired, value, strict=True)):
        problems.append(f"{path}: must be {FORMS}, got {shown(list(value))}")
        return None
    found = [convert(part[1] if isinstance(part, (list, tuple)) else part) for part in value]
    wrong = [index for index, number in enumerate(found) if number is None]
    problems += [f"{path}[{index}]: must be {what}, got {shown(value[index])}" for index in wrong]
    if wrong:
        return None
    numbers = [kind(number) for number in found]
    if not any(paired):
        return numbers
    starts = [as_number(part[0]) for part in value]
    problem = _starts_problem(starts)
    if problem:
        problems.append(f"{path}: {problem}")
        return None
    return [[start, number] for start, number in zip(starts, numbers, strict=True)]


def _starts_problem(starts: list[Any]) -> str | None:
    """What is wrong with where parts begin, in words."""
    if starts[0] != 0:
        return f"the first part begins at 0, got {shown(starts[0])}"
    for start in starts:
        if start is None or start < 0 or (start >= 1 and start != int(start)):
            return (
                "a part begins at a share of the stage from 0 to below 1, or at a step, a whole number, got "
                f"{shown(start)}"
            )
    kinds = {start >= 1 for start in starts[1:]}
    if len(kinds) > 1:
        return "parts begin at shares of the stage or at steps, not at both in one list"
    if any(later <= earlier for earlier, later in pairwise(starts)):
        return f"parts begin one after the other, got {shown(starts)}"
    return None


@dataclass(frozen=True)
class Over:
    """A value over a stage, as `read` gives it.

    Attributes:
        starts: where each part begins: shares of the stage's tokens, or steps.
        values: of each part.
        by_step: whether `starts` are steps.
    """

    starts: tuple[float, ...]
    values: tuple[float, ...]
    by_step: bool = False

    @classmethod
    def of(cls, value: Any) -> Over:
        """From a number or a list."""
        if not isinstance(value, (list, tuple)):
            return cls((0,), (value,))
        if not isinstance(value[0], (list, tuple)):
            return cls(tuple(index / len(value) for index in range(len(value))), tuple(value))
        starts = tuple(part[0] for part in value)
        return cls(starts, tuple(part[1] for part in value), starts[-1] >= 1)

    @property
    def constant(self) -> bool:
        """Whether it is one number all along."""
        return len(set(self.values)) == 1

    @property
    def most(self) -> Any:
        """Its largest value."""
        return max(self.values)

    def begins(self, part: int, tokens: int) -> int:
        """Step, or count of tokens, at which a part begins in a stage of that many tokens."""
        return int(self.starts[part]) if self.by_step else round(self.starts[part] * tokens)

    def part(self, step: int, trained: int, tokens: int) -> int:
        """Number of the part that a step belongs to.

        Args:
            step: from 0.
            trained: tokens before the step.
            tokens: of the whole stage.
        """
        place = step if self.by_step else trained
        return max(part for part in range(len(self.starts)) if self.begins(part, tokens) <= place)

    def at(self, step: int, trained: int, tokens: int) -> Any:
        """Its value at a step; arguments as in `part`."""
        return self.values[self.part(step, trained, tokens)]
