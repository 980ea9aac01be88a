"""`data.source` and `data.mix`: what sources of text are called, alone or by weight, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from linearize.config import names, rules
from linearize.config.ranges import above
from linearize.config.schema import DataConfig, StageDataConfig
from linearize.config.values import as_number, shown
from linearize.registry import closest

WEIGHT = above(0, 1e9)
OWN = ("template", "text_field", "split")
"""What a source of a mix may have of its own."""
FORM = "a weight, such as 0.5, or {weight: 0.5, template: chat}"
PLAIN = (names.BUILTIN, names.TEACHER)
"""Sources of plain text, which take none of `OWN`."""


def source_problem(path: str, value: Any) -> str | None:
    """What is wrong with a text source, or None; whether the text is there shows when it is read."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        rule = "must be builtin, teacher, a file, a folder, a hub dataset, or a list of these"
        return f"{path}: {rule}, got {shown(value)}"
    if names.TEACHER in texts and isinstance(value, (list, tuple)):
        others = ", ".join(f"{text}: 1" for text in texts)
        return (
            f"{path}: the teacher has as much text as one asks for, so in a list nothing says how much of it; "
            f"give weights, {path.removesuffix('source')}mix={{{others}}}, or teacher alone"
        )
    return None


def mix_problems(path: str, mix: Any, source: Any, default: Any) -> list[str]:
    """What is wrong with a mix, one sentence each.

    Args:
        path: dotted key of the section that holds it, such as data.
        mix: source -> weight or mapping.
        source: what stands beside it, as `source`.
        default: what `source` is where nobody gave it.
    """
    if not mix:
        return []
    found = []
    if source not in (default, names.BUILTIN):
        found.append(
            f"{path}.mix: {path}.source={shown(source)} stands beside it, and a mix takes the place of a source; take "
            f"one of them out (~{path}.source or ~{path}.mix)"
        )
    for name, entry in mix.items():
        where = f"{path}.mix.{name}"
        if not str(name).strip():
            found.append(
                f"{path}.mix: a source without a name; give a file, folder, hub dataset, builtin or teacher"
            )
        found += _entry(where, str(name), entry)
    return found


def _entry(where: str, name: str, entry: Any) -> list[str]:
    weight: Any = entry
    found = []
    if isinstance(entry, Mapping):
        for key in entry:
            if key not in ("weight", *OWN):
                found.append(f"{where}.{key}: unknown key; {closest(str(key), ['weight', *OWN])}")
            elif key in OWN and name in PLAIN:
                found.append(f"{where}.{key}: the text of {name} takes no {key}; remove it")
            elif key in OWN and not (isinstance(entry[key], str) and entry[key].strip()):
                found.append(f"{where}.{key}: must be text, got {shown(entry[key])}")
        template = entry.get("template", "none")
        if isinstance(template, str) and template.strip() and template not in rules.TEMPLATES:
            found.append(
                f"{where}.template: unknown value {shown(template)}; {closest(template, rules.TEMPLATES)}"
            )
        if "weight" not in entry:
            return [*found, f"{where}: has no weight; write {FORM}"]
        weight = entry["weight"]
    number = as_number(weight)
    if number is None:
        return [*found, f"{where}: must be {FORM}, got {shown(weight)}"]
    problem = WEIGHT.problem(number)
    if problem:
        found.append(f"{where}: the weight {problem}; leave a source out that is to give nothing")
    return found


def sources(data: DataConfig) -> list[str]:
    """All sources of a section, by name."""
    if data.mix:
        return list(map(str, data.mix))
    return list(map(str, data.source)) if isinstance(data.source, (list, tuple)) else [str(data.source)]


def only_plain(data: DataConfig) -> bool:
    """Whether no source reads template, column or split."""
    return all(name in PLAIN for name in sources(data))


def share(data: DataConfig, name: str) -> float:
    """Share of the tokens that a source gives, 0 to 1."""
    if not data.mix:
        return float(name in sources(data))
    weights = {key: _weight(entry) for key, entry in data.mix.items()}
    return weights.get(name, 0.0) / sum(weights.values())


def parts(data: DataConfig) -> list[tuple[str, float, DataConfig]]:
    """The sources of a mix: name, share of the tokens, and how each is read by itself."""
    found = []
    for name, entry in data.mix.items():
        own = entry if isinstance(entry, Mapping) else {}
        kept: dict[str, Any] = {key: own[key] for key in OWN if key in own}
        if name == names.BUILTIN:
            kept = {
                "template": DataConfig.template,
                "text_field": DataConfig.text_field,
                "split": DataConfig.split,
            }
        read = replace(data, mix={}, source=own.get("source", name), **kept)
        found.append((str(name), share(data, name), read))
    return found


def written(data: DataConfig, files: list[str]) -> DataConfig:
    """The section with the teacher's text in place of its name.

    Args:
        data: a section, or a stage's.
        files: parquet files that hold the text.
    """
    # which control tokens it spells is the teacher's doing: they count
    plain: dict[str, Any] = {
        "template": "rendered",
        "text_field": DataConfig.text_field,
        "split": DataConfig.split,
    }
    if not data.mix:
        return replace(data, source=files, **plain) if data.source == names.TEACHER else data
    mix = dict(data.mix)
    if names.TEACHER in mix:
        mix[names.TEACHER] = {"weight": _weight(mix[names.TEACHER]), "source": files, **plain}
    return replace(data, mix=mix)


def _weight(entry: Any) -> float:
    number = as_number(entry["weight"] if isinstance(entry, Mapping) else entry)
    assert number is not None
    return float(number)


def given(stage: StageDataConfig | None) -> bool:
    """Whether a stage names text of its own."""
    return stage is not None and (stage.source is not None or bool(stage.mix))
