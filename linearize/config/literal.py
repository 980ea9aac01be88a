"""A recipe's values are what they say: nothing is filled in from the environment or from elsewhere.

A recipe is copied into the run's report and the checkpoint's card, which people publish.
"""

from __future__ import annotations

from typing import Any

from linearize.config.values import shown

MISSING = "???"


def without_foreign(value: Any, path: str, problems: list[str]) -> Any:
    """`value` without the texts that stand for something else, for each of which a problem is written.

    Args:
        value: plain nested values.
        path: its dotted key.
        problems: receives one sentence for each.

    Returns:
        The rest; a list that held one of them is left out whole.
    """
    if isinstance(value, dict):
        kept = {}
        for key, inner in value.items():
            before = len(problems)
            dotted = f"{path}.{key}" if path else str(key)
            tidy = without_foreign(inner, dotted, problems)
            if len(problems) == before or isinstance(tidy, dict):
                kept[key] = tidy
        return kept
    if isinstance(value, (list, tuple)):
        return [without_foreign(item, path, problems) for item in value]
    if isinstance(value, str) and (reason := _reason(value)):
        problems.append(f"{path}: {reason}, got {shown(value)}")
    return value


def _reason(text: str) -> str | None:
    if text.strip() == MISSING:
        return "??? marks a value that is still missing; write it, or remove the key"
    if "${" in text:
        return "${...} asks for a value from elsewhere, which a recipe does not read; write the value itself"
    if any(not character.isprintable() and character not in "\n\t" for character in text):
        return "holds characters that cannot be printed"
    return None
