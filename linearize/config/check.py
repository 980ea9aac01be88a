"""From plain YAML values to the typed schema; every mistake is collected."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from linearize.config import rules, schedule, semantics
from linearize.config.literal import without_foreign
from linearize.config.schema import Recipe, StageConfig
from linearize.config.stages import strangers
from linearize.config.values import as_flag, as_number, as_whole, shown
from linearize.registry import closest

T = TypeVar("T")


class _Invalid:
    """Stands for a value that a problem has been written for; the field then keeps its default."""


INVALID = _Invalid()


def check(raw: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Build a recipe from plain values and judge it as a whole.

    Args:
        raw: nested dictionaries, lists, numbers and text, as YAML gives them.

    Returns:
        The recipe and all problems: unknown keys with the nearest valid one, wrong types by full dotted key,
        values out of range, and combinations that cannot work. With problems the recipe is only a partial one.
    """
    tidy = without_removed(raw)
    problems = strangers(tidy)
    recipe = build(Recipe, without_foreign(tidy, "", problems), "", problems)
    broken = {problem.split(": ", 1)[0] for problem in problems}
    return recipe, problems + semantics.problems(recipe, broken)


def build(cls: type[T], raw: Mapping[str, Any], path: str, problems: list[str]) -> T:
    """Fill dataclass `cls` from a mapping; what is wrong is appended to `problems` and left at its default.

    Args:
        cls: a dataclass whose fields all have defaults.
        raw: keys and plain values.
        path: dotted key of the mapping itself, empty for the root.
        problems: receives one sentence for each mistake.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        dotted = f"{path}.{key}" if path else str(key)
        if cls is StageConfig and key == "grad_accum":
            problems += replaced(dotted, value, raw.get("batch_size"))
            continue
        if key not in names:
            known = (
                names if path else [*names, "defaults"]
            )  # which composing takes out where it is spelled right
            problems.append(f"{dotted}: unknown key; {closest(str(key), known)}")
            continue
        if value is not None and key in rules.OVER_STAGE.get(cls, {}):
            typed = _over_stage(cls, key, value, dotted, problems)
        else:
            typed = _convert(hints[key], value, dotted, problems)
        if typed is not INVALID and _allowed(cls, key, typed, dotted, problems):
            values[key] = typed
    return cls(**values)


def _over_stage(cls: type, key: str, value: Any, path: str, problems: list[str]) -> Any:
    """What may change within a stage: a number, a list, or one of the names that the field knows."""
    names = rules.NAMED_COURSES.get(cls, {}).get(key)
    if names is None or isinstance(value, (list, tuple)):
        typed = schedule.read(value, rules.OVER_STAGE[cls][key], path, problems)
        return INVALID if typed is None else typed
    if value in names:
        return value
    problems.append(
        f"{path}: unknown value {shown(value)}; {_choice(value, names)}, or a list over the stage"
    )
    return INVALID


def replaced(path: str, count: Any, batch: Any) -> list[str]:
    """What to write for `grad_accum`, which recipes once had; nothing where it was 1 and said nothing."""
    count, batch = as_number(count), as_number(batch)
    if count == 1:
        return []
    stage = path.removesuffix(".grad_accum")
    size = "batch_size x grad_accum" if count is None or batch is None else f"{batch * count:g}"
    return [
        f"{path}: batch_size counts all sequences of a step now: set {stage}.batch_size={size} and take grad_accum out "
        f"(~{path}); how many are on the device at once is {stage}.micro_batch"
    ]


def without_removed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Null takes out an inherited stage, objective, part, option, rule of layers or source of a mix.

    A name is short for {name: it}.
    """
    tidy = dict(raw)
    if isinstance(tidy.get("layers"), Mapping) and tidy["layers"]:
        tidy["layers"] = _present(tidy["layers"]) or "all"
    if isinstance(tidy.get("mixer"), Mapping):
        tidy["mixer"] = {
            part: {key: option for key, option in value.items() if option is not None}
            if isinstance(value, Mapping)
            else value
            for part, value in _tidy_parts(tidy["mixer"]).items()
            if value is not None
        }
    if isinstance(tidy.get("mixers"), Mapping):
        # there a null stays: it takes something of `mixer` out
        tidy["mixers"] = {
            name: _tidy_parts(change) if isinstance(change, Mapping) else change
            for name, change in tidy["mixers"].items()
            if change is not None
        }
    if isinstance(tidy.get("stages"), Mapping):
        stages = {name: stage for name, stage in tidy["stages"].items() if stage is not None}
        for name, stage in stages.items():
            if isinstance(stage, Mapping) and "objective" in stage:
                stages[name] = {**stage, "objective": _tidy_objective(stage["objective"])}
        tidy["stages"] = stages
    if isinstance(tidy.get("data"), Mapping) and isinstance(tidy["data"].get("mix"), Mapping):
        mix = {name: weight for name, weight in tidy["data"]["mix"].items() if weight is not None}
        tidy["data"] = {**tidy["data"], "mix": mix}
    return tidy


def _present(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null, and without the mappings that nothing else is in."""
    held = {
        key: _present(value) if isinstance(value, Mapping) and value else value
        for key, value in rules.items()
    }
    return {
        key: value
        for key, value in held.items()
        if value is not None and not (value == {} and rules[key] != {})
    }


def _tidy_parts(mixer: Mapping[str, Any]) -> dict[str, Any]:
    """A part's name as {name: it}, and options as the numbers that they mean."""
    parts = dict(mixer)
    for part, value in mixer.items():
        if isinstance(value, str):
            parts[part] = {"name": value}
        elif isinstance(value, Mapping):
            parts[part] = {key: _number(option) for key, option in value.items()}
    return parts


def _number(option: Any) -> Any:
    """A mixer option written as 20k or 1_000 as the number it means; each part checks the rest of its options."""
    number = as_number(option) if isinstance(option, str) else None
    return option if number is None else number


def _tidy_objective(objective: Any) -> Any:
    if isinstance(objective, str):
        return {objective: 1.0}
    if isinstance(objective, Mapping):
        return {
            name: weight
            for name, weight in objective.items()
            if weight is not None and as_number(weight) != 0
        }
    return objective


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as the annotated type, or INVALID after writing down why not."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        inner = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        return None if value is None else _convert(inner[0], value, path, problems)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(typing.cast(type, hint), value, path, problems)
        return _wrong("a section with keys of its own", value, path, problems)
    if origin is list:
        return _convert_list(typing.get_args(hint)[0], value, path, problems)
    if origin is dict:
        return _convert_dict(typing.get_args(hint)[1], value, path, problems)
    return _convert_plain(hint, value, path, problems)


def _convert_plain(hint: type, value: Any, path: str, problems: list[str]) -> Any:
    if hint is int:
        whole = as_whole(value)
        return (
            whole
            if whole is not None
            else _wrong("a whole number (20M and 500k work)", value, path, problems)
        )
    if hint is float:
        number = as_number(value)
        return float(number) if number is not None else _wrong("a number", value, path, problems)
    if hint is bool:
        flag = as_flag(value)
        return flag if flag is not None else _wrong("true or false", value, path, problems)
    assert hint is str, f"the schema has a field of type {hint} that check.py does not know"
    return value if isinstance(value, str) else _wrong("text", value, path, problems)


def _convert_list(item: Any, value: Any, path: str, problems: list[str]) -> Any:
    if isinstance(value, str) and item is str and value:
        value = [value]  # one item may stand without brackets
    if not isinstance(value, (list, tuple)):
        return _wrong("a list", value, path, problems)
    converted = [_convert(item, element, f"{path}[{index}]", problems) for index, element in enumerate(value)]
    return INVALID if any(element is INVALID for element in converted) else converted


def _convert_dict(item: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        return _wrong("a mapping of names to values", value, path, problems)
    converted = {
        str(key): _convert(item, element, f"{path}.{key}", problems) for key, element in value.items()
    }
    return {key: element for key, element in converted.items() if element is not INVALID}


def _wrong(expected: str, value: Any, path: str, problems: list[str]) -> _Invalid:
    problems.append(f"{path}: must be {expected}, got {shown(value)}")
    return INVALID


def _allowed(cls: type, key: str, value: Any, path: str, problems: list[str]) -> bool:
    """Whether the ranges and choices of rules.py hold; if not, the problem is written down."""
    if value is None:
        return True  # the type allows it
    before = len(problems)
    rule = rules.RULES.get(cls, {}).get(key)
    if rule is not None:
        numbers = {} if isinstance(value, str) else {path: value}
        if isinstance(value, dict):
            numbers = {f"{path}.{name}": number for name, number in value.items()}
        elif isinstance(value, list):
            numbers = {
                f"{path}[{index}]": number for index, number in enumerate(schedule.Over.of(value).values)
            }
        problems += [
            f"{where}: {wrong}" for where, number in numbers.items() if (wrong := rule.problem(number))
        ]
    choices = rules.CHOICES.get(cls, {}).get(key)
    if choices is not None and value not in choices:
        problems.append(f"{path}: unknown value {shown(value)}; {_choice(value, choices)}")
    items = rules.ITEM_CHOICES.get(cls, {}).get(key)
    if items is not None:
        if not value and key not in rules.MAY_BE_EMPTY:
            problems.append(f"{path}: empty; name at least one of {', '.join(items)}")
        for item, times in Counter(value).items():
            if item not in items:
                problems.append(f"{path}: unknown value {shown(item)}; {_choice(item, items)}")
            elif times > 1:
                problems.append(f"{path}: names {shown(item)} twice")
    return len(problems) == before


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    nearest = closest(str(value), choices)
    valid = f"valid: {', '.join(choices)}"
    return nearest if nearest == valid or nearest.startswith("valid") else f"{nearest} ({valid})"
