"""Rules that several parts' options share, as sentences for a recipe's report."""

from __future__ import annotations


def choice_problems(**options: tuple[str, tuple[str, ...]]) -> list[str]:
    """``name=(value, valid values)`` -> one sentence for each value that is not valid."""
    return [
        f"{name}: '{value}' is not one of {', '.join(valid)}"
        for name, (value, valid) in options.items()
        if value not in valid
    ]


def at_least(minimum: float, **options: float) -> list[str]:
    """``name=value`` -> one sentence for each value below `minimum`."""
    return [
        f"{name}: {value} must be at least {minimum}" for name, value in options.items() if value < minimum
    ]


def positive(**options: float) -> list[str]:
    """``name=value`` -> one sentence for each value that is not above zero."""
    return [f"{name}: {value} must be positive" for name, value in options.items() if value <= 0]
