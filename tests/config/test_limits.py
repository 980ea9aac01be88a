"""Every number of the schema and of every registered part has two ends; nothing beyond them gets past the check."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from linearize.config import compose, rules, schema
from linearize.config.check import build
from linearize.config.ranges import Range
from linearize.config.values import as_number, shown
from linearize.errors import RecipeError
from linearize.mixers import PARTS, check
from linearize.mixers.options import limits_of

ABSURD = [math.nan, math.inf, -math.inf, -1, 10**18, 1e308, -1e308, 10**400, "9" * 5000, "1e999", 1e-300]
CLASSES = [
    value
    for value in vars(schema).values()
    if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == schema.__name__
]


def numbers(cls: type) -> list[str]:
    """Fields of a class that hold a number, or numbers by name."""
    hints = typing.get_type_hints(cls)
    return [
        field.name
        for field in dataclasses.fields(cls)
        if {int, float} & {hints[field.name], *typing.get_args(hints[field.name])}
    ]


FIELDS = [(cls, name) for cls in CLASSES for name in numbers(cls)]
OPTIONS = [
    (part, name, key)
    for part, (registry, _) in PARTS.items()
    for name in registry.names()
    for key in limits_of(registry.get(name).Config)
]


def test_the_walk_finds_what_there_is():
    assert {(schema.StageConfig, "lr"), (schema.StageConfig, "lr_mixers"), (schema.RunConfig, "seed")} <= set(
        FIELDS
    )
    assert (schema.StageConfig, "objective") in FIELDS and len(FIELDS) > 20
    assert {("window", "sliding", "size"), ("feature_map", "t2r", "dim")} <= set(OPTIONS) and len(
        OPTIONS
    ) > 25


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_every_number_of_the_schema_has_a_range_and_keeps_absurd_ones_out(cls, field):
    limits = rules.RULES[cls][field]
    assert (field in rules.OVER_STAGE.get(cls, {})) == (
        list[typing.Any] in typing.get_args(typing.get_type_hints(cls)[field])
    )
    assert -(10**16) < limits.low <= limits.high < 10**16
    for value in ABSURD:
        problems: list[str] = []
        build(cls, {field: {"next_token": value} if field == "objective" else value}, "", problems)
        number = as_number(value)
        whole = int in (hint := typing.get_type_hints(cls)[field], *typing.get_args(hint))
        allowed = (
            number is not None and limits.problem(number) is None and (not whole or number == int(number))
        )
        assert bool(problems) != allowed, (field, shown(value), problems)
        assert all(len(problem) < 400 for problem in problems)


@pytest.mark.parametrize(("part", "name", "key"), OPTIONS, ids=lambda x: str(x))
def test_every_option_of_a_part_keeps_absurd_numbers_out(part, name, key):
    limits = limits_of(PARTS[part][0].get(name).Config)[key]
    for value in ABSURD[:8]:
        found = check({"feature_map": {"name": "elu"}, part: {"name": name, key: value}})
        if value == -1 and limits.low < 0:
            continue
        assert any(problem.startswith(f"mixer.{part}.{key}: ") for problem in found), (value, found)


def test_the_defaults_of_every_part_lie_in_their_ranges():
    for part, name, key in OPTIONS:
        config = PARTS[part][0].get(name).Config
        assert limits_of(config)[key].problem(getattr(config(), key)) is None, (part, name, key)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.transfer.lr=1e38", "stages.transfer.lr: must be above 0 and at most 100, got 1e+38"),
        ("stages.transfer.lr=nan", "stages.transfer.lr: must be a number"),
        ("stages.transfer.lr=1e-40", "too small to have an effect"),
        (
            "stages.transfer.weight_decay=1e30",
            "stages.transfer.weight_decay: must be at least 0 and at most 100",
        ),
        ("stages.recover.objective.next_token=1e308", "stages.recover.objective.next_token: must be"),
        ("mixer.window.size=1000000000000", "mixer.window.size: must be at least 1 and at most 1048576"),
        ("mixer.window.size=1T", "mixer.window.size: must be"),
        ("mixer.feature_map.dim=1000000000", "mixer.feature_map.dim: must be at least 1 and at most 16384"),
        (
            "mixer.combine.window_weight_init=nan",
            "mixer.combine.window_weight_init: must be above 0 and below 1",
        ),
        ("run.seed=4294967295", "run.seed: must be"),
        ("run.workers=1000000", "run.workers: must be"),
        ("layers={every: 1000000000}", "layers.every: must be"),
        ("layers=[1000000000000000000]", "end before 10000"),
        ("eval.length=1e18", "eval.length: must be"),
    ],
)
def test_slips_of_the_hand(override, expected):
    with pytest.raises(RecipeError) as caught:
        compose("lolcats", [override])
    assert expected in str(caught.value) and "1 problem\n" in str(caught.value)


def test_a_step_must_not_shrink_weights_to_nothing():
    with pytest.raises(
        RecipeError, match=r"weight_decay: each step shrinks the weights by lr x weight_decay = 2"
    ):
        compose("lolcats", ["stages.transfer.lr=0.1", "stages.transfer.weight_decay=20"])


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Range(1, 5), [1, 5], [0, 6]),
        (Range(0, 1, above=True, below=True), [0.5], [0, 1, math.nan]),
        (Range(0, 1), [0, 1], [-1, 1e-13]),
    ],
)
def test_ends(limits, inside, outside):
    assert all(limits.problem(value) is None for value in inside)
    assert all(limits.problem(value) for value in outside)
