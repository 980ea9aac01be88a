"""Where a number may lie, and how to say that it does not: one form for the schema's fields and mixer options alike."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.config.values import shown

SMALLEST = 1e-12
"""What is nearer to zero than this, and not zero, has no effect in float32."""


@dataclass(frozen=True)
class Range:
    """An interval of numbers, closed but where it says otherwise.

    Attributes:
        low, high: its ends.
        above, below: whether `low`, or `high`, lies outside it.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    @property
    def text(self) -> str:
        """The rule in words, "must be above 0 and at most 100"."""
        low = f"{'above' if self.above else 'at least'} {_written(self.low)}"
        high = f"{'below' if self.below else 'at most'} {_written(self.high)}"
        return f"must be {low} and {high}"

    def problem(self, value: float) -> str | None:
        """The rule and the value where it does not hold, or None; NaN lies nowhere."""
        inside = self.low < value if self.above else self.low <= value
        inside = inside and (value < self.high if self.below else value <= self.high)
        if not inside:
            return f"{self.text}, got {shown(value)}"
        if 0 < abs(value) < SMALLEST:
            return f"{shown(value)} is too small to have an effect: {SMALLEST:g} at least"
        return None


def at_least(low: float, high: float) -> Range:
    """From `low` to `high`, both included."""
    return Range(low, high)


def above(low: float, high: float) -> Range:
    """Larger than `low`, up to `high`."""
    return Range(low, high, above=True)


def share(*, whole: bool) -> Range:
    """From 0 to 1, which is included where `whole`."""
    return Range(0, 1, below=not whole)


def _written(number: float) -> str:
    if number == int(number) and abs(number) < 1e10:
        return str(int(number))
    return f"{number:g}".replace("e+", "e")
