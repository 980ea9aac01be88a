"""JSON as every reader takes it: the standard has no NaN and no infinity, and Python writes both as bare words."""

from __future__ import annotations

import json
import math
from typing import Any

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The words in quotation marks, as Protocol Buffers' JSON mapping has them."""


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` in which a number that is not finite is its word as text: "NaN", "Infinity", "-Infinity"."""
    return json.dumps(_written(value), allow_nan=False, **options)


def restored(value: Any) -> Any:
    """A value that `dumps` wrote, its words as numbers again; text that happens to be such a word becomes one too."""
    if isinstance(value, dict):
        return {key: restored(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [restored(inner) for inner in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be drawn and averaged: an int of JSON may be too large for a float."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_written(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
