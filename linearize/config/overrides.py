"""Overrides as the command line writes them: `stages.transfer.lr=5e-3`, `layers=[0,2]`, `~stages.recover`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORM = "overrides look like key=value, for example stages.transfer.lr=5e-3"
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class Override:
    """One change to a composed recipe."""

    key: str
    """Dotted key."""
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
            problems.append(f"'{text}': {error}")
    return parsed, problems


def _parse_one(text: str) -> Override:
    bare = text.lstrip("+")
    remove = bare.startswith("~")
    key, equals, written = bare.removeprefix("~").partition("=")
    key = key.strip()
    if not equals and not remove:
        raise ValueError(f"no '=' in it; {FORM}")
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"'{key}' is not a dotted key; {FORM}")
    return Override(key, None, remove=True) if remove else Override(key, _value(written))


def _value(written: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    try:
        override = parser.parse_override(f"++key={written}")
        if not override.is_sweep_override():
            return override.value()
        reason = "a comma outside brackets asks for a sweep, which a recipe is not"
    except HydraException as error:
        reason = str(error).splitlines()[0]
    if written.lstrip()[:1] in ("[", "{", "'", '"'):
        raise ValueError(f"cannot read the value {written}: {reason}")
    return written
