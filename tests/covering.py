"""Recipes that between them hold every part: what takes seconds a recipe takes these, and the rest is slow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest
from compositions import label, registered

from linearize.bench.subjects import TEACHER, VARIANTS, mixers_of
from linearize.config import compose
from linearize.config.variants import sections
from linearize.mixers import normalize


def fewest(names: Iterable[str], kinds: Callable[[str], frozenset[Hashable]]) -> set[str]:
    """Some of the names, as few as a greedy choice finds, that have every kind which any of them has."""
    has = {name: kinds(name) for name in names}
    missing: set[Hashable] = set().union(*has.values())
    found: set[str] = set()
    while missing:
        # of equals the first one, so that the choice is the same in every process
        best = max(has, key=lambda name: len(has[name] & missing))
        found.add(best)
        missing -= has[best]
    return found


@functools.cache
def parts(name: str) -> frozenset[Hashable]:
    """The parts of a subject's mixers, by name, and whether some of its layers have another one or stay softmax."""
    if name == TEACHER:
        return frozenset()
    mixer, layers, mixers = mixers_of(name)
    given = sections(mixer, mixers).values()
    kinds: set[Hashable] = {
        (part, options["name"]) for section in given for part, options in normalize(section).items()
    }
    return frozenset(kinds | {("mixers", len(mixers) > 0), ("layers", layers == "all")})


@functools.cache
def states(name: str) -> frozenset[Hashable]:
    """Of the parts those that keep something from one call to the next, and how: what a test of states tells apart."""
    kept = {"window", "update", "short_conv", "mixers", "layers"}
    return frozenset(kind for kind in parts(name) if isinstance(kind, tuple) and kind[0] in kept)


@functools.cache
def stages(name: str) -> frozenset[Hashable]:
    """What the stages of a recipe train on, and train."""
    return frozenset(
        kind
        for stage in compose(name).stages.values()
        for kind in (
            ("objective", *sorted(stage.objective)),
            ("trains", *sorted(stage.train)),
            ("window dropout", stage.window_dropout != 0),
            ("untied", stage.untie),
            ("data", stage.data is not None and stage.data.template),
        )
    )


def whole(name: str) -> frozenset[Hashable]:
    """Both: what a run of it meets."""
    return parts(name) | stages(name)


@functools.cache
def compositions() -> frozenset[str]:
    """Labels of registered ones that between them have every value of every option, each update beside each part."""
    mixers = {label(mixer): normalize(mixer) for mixer in registered()}

    def kinds(name: str) -> frozenset[Hashable]:
        given = mixers[name]
        values = {
            (part, given[part]["name"], key, repr(x)) for part in given for key, x in given[part].items()
        }
        beside = {(given["update"]["name"], part, given[part]["name"]) for part in given}
        return frozenset(values | beside)

    return frozenset(fewest(mixers, kinds))


def recipes(
    names: Iterable[str], kinds: Callable[[str], frozenset[Hashable]] = parts, also: Iterable[str] = ()
) -> list[Any]:
    """All names as parameters of a test, those slow that have no kind of part which the others lack.

    Args:
        names: of recipes, `VARIANTS` and `TEACHER`.
        kinds: what a name has; nothing that any of them has is left out.
        also: names that are never slow.
    """
    names = list(names)
    quick = fewest([name for name in names if name not in VARIANTS], kinds)
    quick |= {TEACHER, *also}
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
