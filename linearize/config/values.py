"""Plain values as recipes write them: 20M, 500k, 1e-2, 1_000, true, null."""

from __future__ import annotations

import math
import re
from typing import Any

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_NUMBER = re.compile(
    r"([+-]?(?:(?:\d{1,3}(?:_\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*([kmbgt]?)",
    re.IGNORECASE | re.ASCII,
)
"""An underscore separates thousands and stands nowhere else: 1_0 is a slip of the finger, not a ten."""
LONGEST_NUMBER = 300
"""Characters; a number of more digits is none that a float could hold."""


def as_number(value: Any) -> float | int | None:
    """The number that `value` stands for, or None when it is not one.

    Accepts int and float within what a float holds, and text such as ``"20M"`` (millions), ``"500k"``, ``"1e-2"``,
    ``"1_000"``. Booleans, NaN and infinities are not numbers here. Text that stands for a whole number gives an int.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value if _finite(value) else None
    if not isinstance(value, str) or len(value) > LONGEST_NUMBER:
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
    if not _finite(number):
        return None
    return round(number) if suffix and abs(number - round(number)) < 1e-6 * abs(number) else number


def _finite(number: float | int) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond what a float holds
        return False


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


def quoted(path: object) -> str:
    """A path or a name as a message quotes it: whole, unless nobody could have meant it."""
    text = str(path)
    return f"'{text}'" if len(text) <= 300 and text.isprintable() else repr(text[:300])


def shown(value: Any) -> str:
    """A value as an error message quotes it: short, with its kind when that is what is wrong."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        names = ", ".join(map(str, list(value)[:5])) + (", ..." if len(value) > 5 else "")
        return "a mapping with " + (names if value else "nothing in it")
    if isinstance(value, int) and abs(value) >= 10**50:
        return f"about {'-' if value < 0 else ''}10^{int(value.bit_length() * math.log10(2))}"
    text = repr(value[:60]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
