"""Mixers and layer numbers in a few words, for tables, reports and cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any


def describe(mixer: Mapping[str, Any]) -> str:
    """A mixer in a few words: "sliding 64 + hedgehog", "full softmax, no RoPE", "l2, low_rank gate, delta".

    Args:
        mixer: the section with every part spelled out, as `mixers.normalize` gives it.
    """
    window, feature_map = mixer["window"], mixer["feature_map"]["name"]
    near = "" if window["name"] == "none" else " ".join([window["name"], str(window.get("size", "softmax"))])
    far = "" if feature_map == "none" else feature_map
    if not far:
        first = f"first {window['first']}" if window.get("first") else ""
        rope = "" if mixer["position"].get("window", True) else "no RoPE"
        return ", ".join(part for part in (near, first, rope) if part)
    gate, update = mixer["gate"]["name"], mixer["update"]["name"]
    branches = " + ".join(part for part in (near, far) if part)
    rule = [f"{gate} gate" if gate != "none" else "", update if update != "additive" else ""]
    return ", ".join(part for part in (branches, *rule) if part)


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as ranges: [0, 1, 2, 5] is "0-2, 5"."""
    parts = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ", ".join(parts)
