"""The operators that are timed, one file each. A file has ``cases(tokens, lengths)``; nothing else lists it."""

from __future__ import annotations

import importlib
import pkgutil

from linearize.bench.case import Case

TOKENS = 65_536
"""Tokens of all sequences together."""
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
QUICK_LENGTHS = (2048, 8192)


def all_cases(tokens: int = TOKENS, lengths: tuple[int, ...] = LENGTHS) -> list[Case]:
    """Every case, in the order of the files' names.

    Args:
        tokens: of all sequences together.
        lengths: of a sequence; an operator may take only some of them. Those above `tokens` are left out.
    """
    fitting = tuple(length for length in lengths if length <= tokens) or (tokens,)
    found: list[Case] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        found += importlib.import_module(f"{__name__}.{module.name}").cases(tokens, fitting)
    return found


def operators(cases: list[Case]) -> list[str]:
    """Names of the operators, in order."""
    return list(dict.fromkeys(case.operator for case in cases))
