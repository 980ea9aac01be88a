"""Overrides as the command line writes them: `stages.transfer.lr=5e-3`, `layers=[0,2]`, `~stages.recover`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from linearize.config.values import LONGEST_NUMBER, shown

FORM = "overrides look like key=value, for example stages.transfer.lr=5e-3"
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.([A-Za-z0-9_-]+|\*))*")
LONGEST = 4000
"""Characters of an override: the grammar's parser takes a second for each few thousand."""
DEPTH = 20
"""Brackets in brackets."""


@dataclass(frozen=True)
class Override:
    """One change to a composed recipe."""

    key: str
    """Dotted key; `*` in place of a stage's name stands for every stage."""
    value: Any
    """Plain value, list or dictionary."""
    remove: bool = False
    """Take the key out instead."""


def parse(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Read overrides by hydra's grammar; what cannot be read becomes a problem.

    A `+` or `++` before the key is accepted and means nothing here: unknown keys are judged later, all together.
    A plain value outside hydra's grammar is taken as text: file names with commas or a tilde need no quotes.

    Returns:
        The overrides in order, and one sentence for each that is malformed.
    """
    parsed: list[Override] = []
    problems: list[str] = []
    for text in texts:
        try:
            parsed.append(_parse_one(text.strip()))
        except ValueError as error:
            problems.append(f"{shown(text)}: {error}")
    return parsed, problems


def _parse_one(text: str) -> Override:
    bare = text.lstrip("+")
    remove = bare.startswith("~")
    key, equals, written = bare.removeprefix("~").partition("=")
    key = key.strip()
    if not equals and not remove:
        raise ValueError(f"no '=' in it; {FORM}")
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"{shown(key)} is not a dotted key; {FORM}")
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters; write it into a recipe file")
    return Override(key, None, remove=True) if remove else Override(key, _value(written))


def _value(written: str) -> Any:
    if _depth(written) > DEPTH:
        raise ValueError(f"brackets nested more than {DEPTH} deep")
    if re.search(rf"\d{{{LONGEST_NUMBER},}}", written) or not written.isprintable():
        return written  # as text, which is judged by its key
    from hydra.errors import HydraException

    from linearize.config.grammar import read

    try:
        override = read(written)
        if not override.is_sweep_override():
            return _plain(override.value())
        reason = "a comma outside brackets asks for a sweep, which a recipe is not"
    except HydraException:
        reason = "brackets and quotes must close; a list is [a, b], a mapping {a: b}, other text in quotes"
    if written.lstrip()[:1] in ("[", "{", "'", '"'):
        raise ValueError(f"cannot read the value {shown(written)}: {reason}")
    return written


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    return deepest


def _plain(value: Any) -> Any:
    """The parser's value without its own classes."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
