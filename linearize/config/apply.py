"""Overrides onto a composed recipe, in order: set, replace, remove; `*` for every stage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from linearize.config.overrides import Override
from linearize.config.values import shown
from linearize.registry import closest

EVERY = "*"
EVERY_FORM = "'*' stands for every stage, as in 'stages.*.tokens=2M'"


def apply(tree: dict[str, Any], changes: Sequence[Override]) -> list[str]:
    """Change a recipe in place.

    Args:
        tree: plain nested values.
        changes: a value replaces what stands at its key; sections on the way are made. Naming another choice of a
            mixer part drops the options of the one that it replaces, and naming a text drops the recipe's mix of
            texts, or the other way round.

    Returns:
        One sentence for each change that could not be made.
    """
    problems = []
    _text_anew(tree, changes)
    for change in changes:
        try:
            for keys in _expanded(tree, change.key.split(".")):
                if change.remove:
                    _remove(tree, keys)
                else:
                    _set(tree, keys, change.value)
        except ValueError as error:
            verb = "removed" if change.remove else "set there"
            problems.append(f"{change.key}: cannot be {verb}: {error}")
    return problems


def _text_anew(tree: dict[str, Any], changes: Sequence[Override]) -> None:
    """Take out the recipe's `source` where changes name a `mix`, and its `mix` where they name a `source`."""
    named = {change.key for change in changes}
    given = {change.key for change in changes if not change.remove}
    for one, other in (("source", "mix"), ("mix", "source")):
        section = tree.get("data")
        if f"data.{one}" in given and f"data.{other}" not in named and isinstance(section, dict):
            section.pop(other, None)


def name_part(mixer: dict[str, Any], part: str, options: dict[str, Any]) -> None:
    """Set a mixer part by name: the options of another choice fall away, those of the same one stay."""
    inherited = mixer.get(part)
    if isinstance(inherited, str):
        inherited = {"name": inherited}
    same = isinstance(inherited, dict) and inherited.get("name") == options["name"]
    mixer[part] = {**inherited, **options} if same and isinstance(inherited, dict) else options


def _expanded(tree: dict[str, Any], keys: list[str]) -> Iterator[list[str]]:
    """The keys themselves, or for `stages.*.field` those of each stage that the field can stand in."""
    if EVERY not in keys:
        yield keys
        return
    if keys[0] != "stages" or keys.index(EVERY) != 1 or keys.count(EVERY) > 1 or len(keys) < 3:
        raise ValueError(EVERY_FORM)
    found = tree.get("stages")
    stages = found if isinstance(found, dict) else {}
    named = [name for name, stage in stages.items() if stage is not None]
    if keys[2] == "lora" and len(keys) > 3:
        named = [name for name in named if isinstance(stages[name], dict) and stages[name].get("lora")]
    if not named:
        raise ValueError("the recipe has no stage that it could stand in")
    for name in named:
        yield ["stages", name, *keys[2:]]


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    node = tree
    for depth, key in enumerate(keys[:-1], start=1):
        inner = node.get(key)
        if isinstance(inner, str):
            inner = _opened(keys[:depth], inner)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(keys[:depth])} is {shown(inner)}, which has no keys of its own")
        node[key] = inner
        node = inner
    if re.fullmatch(r"(mixer|mixers\.[\w-]+)\.\w+\.name", ".".join(keys)) and isinstance(value, str):
        mixer = tree["mixer"] if keys[0] == "mixer" else tree["mixers"][keys[1]]
        name_part(mixer, keys[-2], {"name": value})
    else:
        node[keys[-1]] = value


def _opened(keys: list[str], short: str) -> Any:
    """The mapping that a name is short for, where it is short for one."""
    if (len(keys), keys[0]) in ((2, "mixer"), (3, "mixers")):
        return {"name": short}
    if len(keys) == 3 and keys[0] == "stages" and keys[2] == "objective":
        return {short: 1.0}
    if keys == ["layers"]:
        return {}  # the forms of `layers` exclude each other
    return short


def _remove(tree: dict[str, Any], keys: list[str]) -> None:
    node: Any = tree
    for key in keys[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or keys[-1] not in node:
        names = list(map(str, node)) if isinstance(node, dict) else []
        raise ValueError(f"nothing to remove; {closest(keys[-1], names)}")
    del node[keys[-1]]
