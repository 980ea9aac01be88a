"""Plain values as recipes write them: 20M, 500k, 1e-2, 1_000, true, null."""

from __future__ import annotations

import math
import re
from typing import Any

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d+)?)\s*([kmbgt]?)", re.IGNORECASE)


def as_number(value: Any) -> float | int | None:
    """The number that `value` stands for, or None when it is not one.

    Accepts int, finite float, and text such as ``"20M"`` (millions), ``"500k"``, ``"1e-2"``, ``"1_000"``.
    Booleans, NaN and infinities are not numbers here. Text that stands for a whole number gives an int.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, str):
        return None
    match = _NUMBER.fullmatch(value.strip())
    if match is None:
        return None
    digits, suffix = match.group(1).replace("_", ""), match.group(2).lower()
    try:
        number: float | int = int(digits)
    except ValueError:
        number = float(digits)
    number *= SUFFIXES[suffix]
    if not math.isfinite(number):
        return None
    return round(number) if suffix and abs(number - round(number)) < 1e-6 * abs(number) else number


def as_whole(value: Any) -> int | None:
    """Like `as_number`, for counts: a number with a fraction is None."""
    number = as_number(value)
    return None if number is None or number != int(number) else int(number)


def as_flag(value: Any) -> bool | None:
    """True or false, also as the words true/false, yes/no, on/off."""
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    return words.get(value.lower()) if isinstance(value, str) else None


def shown(value: Any) -> str:
    """A value as an error message quotes it: short, with its kind when that is what is wrong."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping with " + (", ".join(map(str, value)) if value else "nothing in it")
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
