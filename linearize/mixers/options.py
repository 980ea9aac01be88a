"""Rules that several parts' options share, as sentences for a recipe's report."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from linearize.config.ranges import Range

WIDEST = 16_384
"""Of features, slots and ranks: states grow with them, and no head or hidden state is wider."""
LONGEST = 2**20
"""Tokens that a window may hold: their keys and values are kept for each sequence."""
ANY: dict[type, Range] = {int: Range(-(10**6), 10**6), float: Range(-1e6, 1e6)}
"""Type -> where an option lies that says nothing of its own."""


def number(
    default: float,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its range; an end that is not named is that of `ANY`.

    Args:
        default: its default.
        least, most: ends that belong to the range.
        above, below: ends that do not.
    """
    assert least is None or above is None, "one lower end"
    assert most is None or below is None, "one upper end"
    anywhere = ANY[type(default)]
    low = above if above is not None else anywhere.low if least is None else least
    high = below if below is not None else anywhere.high if most is None else most
    limits = Range(low, high, above=above is not None, below=below is not None)
    return dataclasses.field(default=default, metadata={"limits": limits})


def limits_of(config: type) -> dict[str, Range]:
    """Option -> range, of every number among a part's options."""
    kinds = typing.get_type_hints(config)
    return {
        field.name: field.metadata.get("limits", ANY[kinds[field.name]])
        for field in dataclasses.fields(config)
        if kinds[field.name] in ANY
    }


def choice_problems(**options: tuple[str, tuple[str, ...]]) -> list[str]:
    """``name=(value, valid values)`` -> one sentence for each value that is not valid."""
    return [
        f"{name}: '{value}' is not one of {', '.join(valid)}"
        for name, (value, valid) in options.items()
        if value not in valid
    ]
