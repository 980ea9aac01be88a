from __future__ import annotations

import math

import pytest

from linearize.config.values import as_flag, as_number, as_whole, shown


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("20M", 20_000_000),
        ("500k", 500_000),
        ("1.5M", 1_500_000),
        ("2B", 2_000_000_000),
        ("1_000", 1000),
        ("-12_345_678.5", -12_345_678.5),
        ("1_000k", 1_000_000),
        ("1e-2", 0.01),
        ("5E3", 5000.0),
        ("-3", -3),
        (".5", 0.5),
        ("20 M", 20_000_000),
        (7, 7),
        (0.25, 0.25),
    ],
)
def test_numbers_as_recipes_write_them(written, number):
    assert as_number(written) == number


@pytest.mark.parametrize(
    "written",
    [
        *("", "abc", "20MM", "M", "1,000", True, None, math.nan, math.inf, "1e999", [1], "0x10"),
        *("1_0", "1__000", "1000_000", "_1", "1_", "1_000_", "1._5", "1.5_0", "1e1_0", "10_00k", "\u0663"),
    ],
)
def test_what_is_no_number(written):
    assert as_number(written) is None


def test_a_count_takes_only_whole_numbers():
    assert as_whole("20k") == 20_000 and isinstance(as_whole("1.5k"), int)
    assert as_whole(1e6) == 1_000_000 and isinstance(as_whole(1e6), int)
    assert as_whole(2.5) is None


def test_flags():
    assert as_flag("yes") is True and as_flag(False) is False
    assert as_flag(1) is None and as_flag("maybe") is None


def test_long_values_are_cut_in_messages():
    assert len(shown("x" * 500)) < 70
    assert shown(None) == "null"
