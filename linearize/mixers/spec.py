"""The recipe's `mixer:` section: checked, filled with defaults, built."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from linearize.mixers.base import LayerShape, Part
from linearize.mixers.combine import COMBINES
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.mixer import Mixer
from linearize.mixers.update import UPDATES
from linearize.mixers.window import WINDOWS
from linearize.registry import Registry, closest

PARTS: dict[str, tuple[Registry[Any], str]] = {
    "feature_map": (FEATURE_MAPS, "none"),
    "window": (WINDOWS, "none"),
    "update": (UPDATES, "additive"),
    "combine": (COMBINES, "shared_normalizer"),
}
"""Part -> its registry, and the choice when a recipe does not name it; `feature_map: none`: no recurrent branch."""


def check(mixer: dict[str, Any]) -> list[str]:
    """Every mistake of a mixer section, as sentences that begin with the dotted key; empty when it is fine."""
    problems = []
    for part, given in mixer.items():
        if part not in PARTS:
            problems.append(f"mixer.{part}: no such part; {closest(str(part), PARTS)}")
        elif not isinstance(given, dict) or not isinstance(given.get("name"), str):
            example = f"{{name: {PARTS[part][0].names()[0]}}}"
            problems.append(f"mixer.{part}: {given!r} must be a mapping with a name, such as {example}")
        elif given["name"] != "none" or "none" in PARTS[part][0]:
            problems += _check_part(part, given)
    if problems:
        return problems
    names = {part: options["name"] for part, options in normalize(mixer).items()}
    if names["window"] == "none" and names["feature_map"] == "none":
        problems.append("mixer: neither a window nor a feature map; name at least one branch")
    if names["window"] == "full" and names["feature_map"] != "none":
        problems.append(
            "mixer.window: 'full' leaves no key to the recurrent branch; use a sliding window, or "
            "feature_map: {name: none}"
        )
    if names["feature_map"] != "none" and names["update"] == "none":
        problems.append(
            "mixer.update: 'none' needs feature_map: {name: none}, which switches the recurrent branch off"
        )
    if names["feature_map"] != "none" and not FEATURE_MAPS.get(names["feature_map"]).non_negative:
        problems.append(
            f"mixer.feature_map: '{names['feature_map']}' has signed features, which a running-sum normalizer cannot "
            "divide by"
        )
    if names["feature_map"] != "none" and names["window"] != "none" and names["combine"] == "none":
        problems.append(
            "mixer.combine: 'none' leaves two branches apart; name a rule that joins them, or drop one branch"
        )
    return problems


def _check_part(part: str, given: dict[str, Any]) -> list[str]:
    registry = PARTS[part][0]
    if given["name"] not in registry:
        hint = closest(given["name"], [*registry.names(), "none"])
        return [f"mixer.{part}.name: unknown {registry.kind} '{given['name']}'; {hint}"]
    config = registry.get(given["name"]).Config
    types = typing.get_type_hints(config)
    found = []
    for key, value in given.items():
        where = f"mixer.{part}.{key}"
        if key == "name":
            continue
        if key not in types:
            found.append(f"{where}: {given['name']} has no such option; {closest(key, types)}")
        elif not _fits(value, types[key]):
            found.append(f"{where}: {value!r} must be {types[key].__name__}")
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

    window_class, window_options = part("window")
    window = window_class(window_options, shape)
    if whole["feature_map"]["name"] == "none":
        return Mixer(shape, window, None, None, None)
    map_class, map_options = part("feature_map")
    feature_map = map_class(map_options, shape)
    update_class, update_options = part("update")
    update = update_class(update_options, feature_map.state_heads, feature_map.feature_dim, shape.value_dim)
    combine = None
    if window.size != 0:
        combine_class, combine_options = part("combine")
        combine = combine_class(combine_options, shape)
    return Mixer(shape, window, feature_map, update, combine)
