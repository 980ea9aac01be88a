"""Which compositions of parts make no sense, and why: checked when a recipe is read."""

from __future__ import annotations

from typing import Any

from linearize.mixers.combine import COMBINES
from linearize.mixers.feature_map import FEATURE_MAPS
from linearize.mixers.feature_map.shared import PerHeadProjection
from linearize.mixers.gate import GATES
from linearize.mixers.normalizer import NORMALIZERS
from linearize.mixers.position import POSITIONS
from linearize.mixers.update import UPDATES


def composition_problems(mixer: dict[str, Any]) -> list[str]:
    """Every rule that a whole section breaks, as sentences that begin with the dotted key.

    Args:
        mixer: a normalized section whose parts are fine each by itself.
    """
    names = {part: options["name"] for part, options in mixer.items()}
    if names["feature_map"] == "none":
        return _without_recurrence(names)
    problems = _branches(names)
    if names["update"] == "none":
        problems.append(
            "mixer.update: 'none' needs feature_map: {name: none}, which switches the recurrent branch off"
        )
        return problems
    if not UPDATES.get(names["update"]).uses_keys and issubclass(
        FEATURE_MAPS.get(names["feature_map"]), PerHeadProjection
    ):
        problems.append(
            f"mixer.feature_map: update '{names['update']}' does not read the features of the key, so the learned key "
            f"map of '{names['feature_map']}' would never train; use a map without parameters (softmax_dim)"
        )
    return problems + _arrival(mixer, names) + _gate(names) + _normalizer(names)


def _without_recurrence(names: dict[str, str]) -> list[str]:
    problems = []
    if names["window"] == "none":
        problems.append("mixer: neither a window nor a feature map; name at least one branch")
    for part in ("short_conv", "gate"):
        if names[part] != "none":
            problems.append(
                f"mixer.{part}: '{names[part]}' belongs to the recurrent branch, which needs a feature map"
            )
    if POSITIONS.get(names["position"]).turns:
        problems.append(
            f"mixer.position: '{names['position']}' turns the recurrent branch alone, which needs a feature map; "
            "use rope"
        )
    return problems


def _branches(names: dict[str, str]) -> list[str]:
    problems = []
    if names["window"] == "full":
        problems.append(
            "mixer.window: 'full' leaves no key to the recurrent branch; use a sliding window, or "
            "feature_map: {name: none}"
        )
    if names["window"] != "none" and names["combine"] == "none":
        problems.append(
            "mixer.combine: 'none' leaves two branches apart; name a rule that joins them, or drop one branch"
        )
    return problems


def _arrival(mixer: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Keys that come late out of a window meet only the plain additive rule."""
    if names["window"] in ("none", "full") or mixer["window"].get("overlap"):
        return []
    remedy = f"give the window overlap: true, so that the recurrent branch sees every token at once ({names['window']})"
    problems = []
    for part in ("short_conv", "gate"):
        if names[part] != "none":
            problems.append(f"mixer.{part}: '{names[part]}' needs keys at their own time; {remedy}")
    if not UPDATES.get(names["update"]).dense:
        problems.append(f"mixer.update: '{names['update']}' needs keys at their own time; {remedy}")
    rotated = {branch: mixer["position"].get(branch, True) for branch in ("window", "recurrent")}
    if rotated["window"] != rotated["recurrent"]:
        off = "window" if rotated["recurrent"] else "recurrent"
        problems.append(
            f"mixer.position.{off}: false needs keys at their own time, since those that come out of a window are as "
            f"the window sees them; {remedy}, or give both branches the same"
        )
    if POSITIONS.get(names["position"]).turns:
        problems.append(f"mixer.position: '{names['position']}' needs keys at their own time; {remedy}")
    return problems


def _gate(names: dict[str, str]) -> list[str]:
    rule = UPDATES.get(names["update"])
    kind = "none"
    if names["gate"] != "none":
        kind = "feature" if GATES.get(names["gate"]).per_feature else "head"
    if kind in rule.decays:
        return []
    wanted = {"none": "no gate", "head": "a gate per head", "feature": "a gate per feature"}
    fitting = [
        name
        for name in GATES.names()
        if ("feature" if GATES.get(name).per_feature else "head") in rule.decays
    ]
    names_of = f" ({', '.join(fitting)})" if fitting else ""
    return [
        f"mixer.gate: update '{names['update']}' takes {' or '.join(wanted[k] for k in rule.decays)}{names_of}, "
        f"not {wanted[kind]}"
    ]


def _normalizer(names: dict[str, str]) -> list[str]:
    problems = []
    sums = names["normalizer"] != "none" and NORMALIZERS.get(names["normalizer"]).running_sum
    signed = sums and NORMALIZERS.get(names["normalizer"]).signed
    if sums and not signed and not FEATURE_MAPS.get(names["feature_map"]).non_negative:
        problems.append(
            f"mixer.feature_map: '{names['feature_map']}' has signed features, which a running-sum normalizer cannot "
            "divide by; use normalizer: {name: none}, {name: group_norm} or {name: bounded}"
        )
    if UPDATES.get(names["update"]).positive and not FEATURE_MAPS.get(names["feature_map"]).non_negative:
        problems.append(
            f"mixer.feature_map: '{names['feature_map']}' has signed features, by whose sums update "
            f"'{names['update']}' cannot divide; use exp, elu or softmax_dim"
        )
    if sums and not UPDATES.get(names["update"]).sums_weights:
        problems.append(
            f"mixer.normalizer: update '{names['update']}' leaves no sum of its weights to divide by; use "
            "normalizer: {name: none} or {name: group_norm}"
        )
    joined = names["window"] != "none" and names["combine"] != "none"
    if joined and (signed or not sums) and COMBINES.get(names["combine"]).needs_normalizer:
        problems.append(
            f"mixer.combine: '{names['combine']}' shares the running sum, which normalizer '{names['normalizer']}' "
            "does not keep; use weighted, sigmoid or sum"
        )
    return problems
