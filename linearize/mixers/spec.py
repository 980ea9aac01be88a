"""The recipe's `mixer:` section: checked, filled with defaults, built."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import torch

from linearize.config.values import shown
from linearize.mixers.base import LayerShape, Part
from linearize.mixers.combine import COMBINES
from linearize.mixers.composition import composition_problems
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.gate import GATES
from linearize.mixers.mixer import Mixer
from linearize.mixers.normalizer import NORMALIZERS
from linearize.mixers.options import limits_of
from linearize.mixers.output import OUTPUTS
from linearize.mixers.position import POSITIONS
from linearize.mixers.recurrent import Recurrent
from linearize.mixers.short_conv import SHORT_CONVS
from linearize.mixers.update import UPDATES
from linearize.mixers.window import WINDOWS
from linearize.registry import Registry, closest

PARTS: dict[str, tuple[Registry[Any], str]] = {
    "short_conv": (SHORT_CONVS, "none"),
    "feature_map": (FEATURE_MAPS, "none"),
    "gate": (GATES, "none"),
    "update": (UPDATES, "additive"),
    "normalizer": (NORMALIZERS, "running_sum"),
    "window": (WINDOWS, "none"),
    "combine": (COMBINES, "shared_normalizer"),
    "output": (OUTPUTS, "none"),
    "position": (POSITIONS, "rope"),
}
"""Part -> its registry, and the choice when a recipe does not name it; `feature_map: none`: no recurrent branch."""
ALWAYS = ("position",)
"""Parts that no mixer is without."""


def check(mixer: dict[str, Any]) -> list[str]:
    """Every mistake of a mixer section, as sentences that begin with the dotted key; empty when it is fine."""
    problems = []
    for part, given in mixer.items():
        if part not in PARTS:
            problems.append(f"mixer.{part}: no such part; {closest(str(part), PARTS)}")
        elif not isinstance(given, dict) or not isinstance(given.get("name"), str):
            example = f"{{name: {PARTS[part][0].names()[0]}}}"
            problems.append(f"mixer.{part}: {shown(given)} must be a mapping with a name, such as {example}")
        elif given["name"] != "none" or part in ALWAYS or "none" in PARTS[part][0]:
            problems += _check_part(part, given)
    if problems:
        return problems
    return composition_problems(normalize(mixer))


def has_parameters(mixer: dict[str, Any]) -> bool:
    """Whether a section that `check` finds no fault with has anything to train."""
    shape = LayerShape(4, 2, 16, 16, 0.25, model_dim=64, rotary="half")
    with torch.device("meta"):
        return any(True for _ in build(mixer, shape).parameters())


def needs_training(mixer: dict[str, Any]) -> bool:
    """Whether it computes something else than softmax until it, or the model around it, has been trained."""
    return normalize(mixer)["feature_map"]["name"] != "none" or has_parameters(mixer)


def _check_part(part: str, given: dict[str, Any]) -> list[str]:
    registry = PARTS[part][0]
    if given["name"] not in registry:
        hint = closest(given["name"], registry.names() + ["none"] * (part not in ALWAYS))
        return [f"mixer.{part}.name: unknown {registry.kind} {shown(given['name'])}; {hint}"]
    config = registry.get(given["name"]).Config
    types, ranges = typing.get_type_hints(config), limits_of(config)
    found = []
    for key, value in given.items():
        where = f"mixer.{part}.{key}"
        if key == "name":
            continue
        if key not in types:
            found.append(
                f"{where}: {given['name']} has no such option; {closest(str(key), ['name', *types])}"
            )
        elif not _fits(value, types[key]):
            found.append(f"{where}: {shown(value)} must be {types[key].__name__}")
        elif (limits := ranges.get(key)) is not None and (problem := limits.problem(value)):
            found.append(f"{where}: {problem}")
    if not found:
        options = _options(config, given)
        found = [f"mixer.{part}.{problem}" for problem in getattr(options, "problems", list)()]
    return found


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _options(config: type[Part.Config], given: dict[str, Any]) -> Any:
    return config(**{key: value for key, value in given.items() if key != "name"})


def normalize(mixer: dict[str, Any]) -> dict[str, Any]:
    """The section with every part and every option spelled out; this is what a checkpoint stores."""
    whole = {}
    for part, (registry, default) in PARTS.items():
        given = mixer.get(part) or {"name": default}
        options = {}
        if given["name"] in registry:
            options = dataclasses.asdict(_options(registry.get(given["name"]).Config, given))
        whole[part] = {"name": given["name"], **options}
    return whole


def build(mixer: dict[str, Any], shape: LayerShape) -> Mixer:
    """A mixer for one layer.

    Args:
        mixer: a section that `check` finds no fault with.
        shape: the layer's numbers.
    """
    whole = normalize(mixer)

    def part(kind: str) -> tuple[type[Any], Any]:
        cls = PARTS[kind][0].get(whole[kind]["name"])
        return cls, _options(cls.Config, whole[kind])

    def made(kind: str, *arguments: Any) -> Any:
        if whole[kind]["name"] == "none" and "none" not in PARTS[kind][0]:
            return None
        cls, options = part(kind)
        return cls(options, shape, *arguments)

    def wired(*parts: Any) -> Mixer:
        mixer = Mixer(shape, *parts)
        mixer.composition = f"{whole} {shape}"
        return mixer

    position, window, output = made("position"), made("window"), made("output")
    if whole["feature_map"]["name"] == "none":
        return wired(position, window, None, None, output)
    feature_map, normalizer = made("feature_map"), made("normalizer")
    rule, rule_options = part("update")
    gate = made("gate", rule.gate_dim(rule_options, feature_map.feature_dim))
    heads = max(feature_map.state_heads, gate.heads if gate is not None else 0)
    update = rule(
        rule_options,
        heads,
        feature_map.feature_dim,
        shape.value_dim,
        shape,
        running_sum=normalizer.running_sum,
    )
    delayed = window.size != 0 and not getattr(window, "overlap", False)
    recurrent = Recurrent(
        shape, feature_map, update, normalizer, short_conv=made("short_conv"), gate=gate, delayed=delayed
    )
    combine = made("combine") if window.size != 0 else None
    return wired(position, window, recurrent, combine, output)
