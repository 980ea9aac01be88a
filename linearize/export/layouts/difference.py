"""What a mixer computes that a foreign layer does not, in words: one sentence a part."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from linearize.mixers import LayerShape
from linearize.mixers.spec import PARTS

Section = dict[str, Any]
"""A normalized mixer section: part -> its name and every option."""


@dataclass(frozen=True)
class Difference:
    """One thing in which a layer or a model and the foreign one differ.

    Attributes:
        part: of the mixer, or of the model around it.
        ours, theirs: what each has there.
    """

    part: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.part}: {self.ours}, there {self.theirs}"


def said(mixer: Section, part: str) -> str:
    """A part's choice and those of its options that are not the default."""
    options = dict(mixer[part])
    name = options.pop("name")
    registry = PARTS[part][0]
    usual = dataclasses.asdict(registry.get(name).Config()) if name in registry else {}
    rest = [f"{key} {value}" for key, value in options.items() if usual.get(key) != value]
    return f"{name} ({', '.join(rest)})" if rest else str(name)


def unlike(mixer: Section, part: str, fits: bool, theirs: str) -> list[Difference]:
    """A difference, unless a part `fits`."""
    return [] if fits else [Difference(part, said(mixer, part), theirs)]


def as_they_are(mixer: Section) -> bool:
    """Whether queries and keys enter the rule without a feature map and without being normalized."""
    feature = mixer["feature_map"]
    return feature["name"] == "identity" and not feature["l2_normalize"]


def absent(mixer: Section, *parts: str) -> list[Difference]:
    """A difference for each part that a mixer has and the foreign layer has nothing like."""
    return [Difference(part, said(mixer, part), "none") for part in parts if mixer[part]["name"] != "none"]


def rotated(mixer: Section, shape: LayerShape) -> list[Difference]:
    """What differs where the foreign recurrence sees queries and keys without rotary positions."""
    position = mixer["position"]
    found = []
    if position["recurrent"] and shape.rotary != "none":
        found.append(Difference("position", "RoPE in the recurrent branch", "none"))
    if position["name"] != "rope":
        found.append(Difference("position", said(mixer, "position"), "none"))
    return found
