"""The mixers of a recipe: `mixer`, and under `mixers:` others, each written as what it changes in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from linearize.config.layers import used
from linearize.config.names import DEFAULT, SOFTMAX
from linearize.config.values import shown

OF_RECURRENCE = ("short_conv", "gate", "update", "normalizer", "combine")
"""Parts that mean nothing without a feature map, which a variant without one therefore does not inherit."""
LONGEST = 100
"""Characters of a name."""


def sections(mixer: Mapping[str, Any], mixers: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Name -> the whole section of each mixer of a recipe.

    Args:
        mixer: the recipe's own, which is called `DEFAULT`.
        mixers: name -> what that one changes, see `laid`.
    """
    return {DEFAULT: dict(mixer)} | {name: laid(mixer, change) for name, change in (mixers or {}).items()}


def given(mixer: Mapping[str, Any], mixers: Mapping[str, Any], layers: Any) -> list[dict[str, Any]]:
    """The sections of the mixers that a recipe's layers get; see `layers.used`."""
    whole = sections(mixer, mixers)
    return [whole[name] for name in used(layers, mixers)]


def laid(mixer: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A section with a change laid over it.

    A part that the change names takes the place of the one that is there, but for the options of the same choice; a
    part without a name changes options; null takes a part or an option out. With ``feature_map: none`` whatever belongs
    to the recurrent branch goes with it, so that ``{feature_map: none}`` is the window alone.
    """
    parts = {part: dict(options) for part, options in mixer.items()}
    map_given = change.get("feature_map", {})
    if map_given is None or map_given.get("name") == "none":
        parts = {part: options for part, options in parts.items() if part not in OF_RECURRENCE}
    for part, options in change.items():
        if options is None:
            parts.pop(part, None)
            continue
        kept = parts.get(part, {})
        if "name" in options and options["name"] != kept.get("name"):
            kept = {}
        parts[part] = {key: value for key, value in {**kept, **options}.items() if value is not None}
    return parts


def form_problems(mixers: Mapping[str, Any]) -> list[str]:
    """What is wrong with the form of a `mixers:` section, whatever the parts say."""
    found = []
    for name, change in mixers.items():
        path = f"mixers.{name}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", str(name)) or len(name) > LONGEST:
            found.append(f"{path[:60]}: a mixer's name is a letter, then letters, digits, - and _")
        elif name in (DEFAULT, SOFTMAX, "all"):
            found.append(
                f"{path}: the name is taken; {DEFAULT} is what `mixer` describes, {SOFTMAX} what stays as it is"
            )
        if not isinstance(change, dict):
            found.append(f"{path}: must be a mapping of parts, as `mixer` is, got {shown(change)}")
            continue
        if not change:
            found.append(f"{path}: changes nothing in `mixer`; name the parts that differ")
        found += [
            f"{path}.{part}: must be a name or {{name: ..., option: value}}, got {shown(value)}"
            for part, value in change.items()
            if not (value is None or isinstance(value, dict))
        ]
    return found
