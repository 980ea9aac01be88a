from __future__ import annotations

import pytest

from linearize.config.overrides import Override, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages.transfer.lr=5e-3", Override("stages.transfer.lr", 5e-3)),
        ("layers=[0,2]", Override("layers", [0, 2])),
        ("layers={every: 4}", Override("layers", {"every": 4})),
        ("++mixer.window.size=32", Override("mixer.window.size", 32)),
        ("~stages.recover", Override("stages.recover", None, remove=True)),
        ("data.source=/a b/c.parquet", Override("data.source", "/a b/c.parquet")),
        ("data.source=~/texts", Override("data.source", "~/texts")),
        ("data.source=x,y.txt", Override("data.source", "x,y.txt")),
        ("data.source=day=3.txt", Override("data.source", "day=3.txt")),
        ("data.source=é.txt", Override("data.source", "é.txt")),
        ("data.source='a,b'", Override("data.source", "a,b")),
        ("data.boundaries=false", Override("data.boundaries", False)),
        ("stages.transfer.lr=1_0", Override("stages.transfer.lr", "1_0")),
        ("stages.transfer.lr= 1_0.5 ", Override("stages.transfer.lr", "1_0.5")),
        ("stages.transfer.lr=1e1_0", Override("stages.transfer.lr", "1e1_0")),
        ("stages.transfer.tokens=1_000_000", Override("stages.transfer.tokens", 1_000_000)),
        ("layers=[1_0,{a: [2_0, 3]}]", Override("layers", ["1_0", {"a": ["2_0", 3]}])),
    ],
)
def test_forms(text, expected):
    assert parse([text]) == ([expected], [])


def test_malformed_ones_are_reported_together_and_the_rest_is_kept():
    parsed, problems = parse(["layers", "=3", "a b=1", "layers=[0,", "data.length=8"])
    assert parsed == [Override("data.length", 8)]
    assert len(problems) == 4
    assert "no '='" in problems[0]
    assert "not a dotted key" in problems[1] and "not a dotted key" in problems[2]
    assert "cannot read the value" in problems[3]


@pytest.mark.parametrize("written", ["{a: 1, a: 2}", "{b: {a: 1, a: 2}}", "[0, {a: x, b: y, a: z}]"])
def test_a_key_stands_once_in_a_mapping(written):
    parsed, problems = parse([f"mixer.gate={written}", "data.length=8"])
    assert parsed == [Override("data.length", 8)]
    assert problems == [f"'mixer.gate={written}': 'a' stands twice in one mapping; keep one of them"]
