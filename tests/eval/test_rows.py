"""Rows of results.json: written whole, read back equal, refused when they are none."""

from __future__ import annotations

import json
import math

import pytest

from linearize.errors import CheckpointError
from linearize.eval.rows import METRICS, Score, Scores, key_of

ROW = Score(
    "demo", "student", "quick", "text", "ppl", math.inf, None, None, 63, 1024, "position", "64-128", key="a"
)


def test_rows_survive_the_process(tmp_path):
    path = tmp_path / "eval" / "results.json"
    path.parent.mkdir()
    scores = Scores(path)
    scores.add([ROW])
    scores.add(
        [Score("demo", "teacher", "quick", "text", "kl", 0.25, 0.2, 0.3, 63, against="teacher", key="b")]
    )
    again = Scores(path)
    assert again.rows == scores.rows
    assert again.of("a") == [ROW] and again.of("c") == []
    assert (
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))["rows"][0]["value"]
        == "Infinity"
    )
    again.add([ROW])
    assert len(Scores(path).rows) == 3


def test_what_a_row_holds(tmp_path):
    named = {
        "model",
        "role",
        "suite",
        "task",
        "metric",
        "length",
        "bucket",
        "value",
        "low",
        "high",
        "n",
        "seed",
    }
    assert named | {"version", "command", "by", "against", "key"} == set(ROW.to_dict())
    assert all(metric.better in ("higher", "lower", "") and metric.about for metric in METRICS.values())


@pytest.mark.parametrize(
    "document",
    [
        {"rows": [{"name": "teacher", "perplexity": {}}]},
        {"format": 2, "rows": []},
        {"format": 1, "rows": [{"model": "demo"}]},
        {"format": 1, "rows": [{**ROW.to_dict(), "value": "high"}]},
        {"format": 1, "rows": [{**ROW.to_dict(), "task": 3}]},
        *(
            {"format": 1, "rows": [{**ROW.to_dict(), name: value}]}
            for name, value in (
                ("key", []),
                ("version", None),
                ("command", 10**400),
                ("against", {}),
                ("length", "512"),
                ("length", -1),
                ("n", 1.5),
                ("n", True),
                ("seed", []),
                ("value", 10**400),
                ("low", "x"),
            )
        ),
        *(
            {"format": 1, "rows": [{**ROW.to_dict(), "by": by, "bucket": bucket}]}
            for by, bucket in (
                ("position", ""),
                ("distance", "64-"),
                ("depth", "deep"),
                ("batch", "²"),
                ("", 3),
            )
        ),
    ],
)
def test_other_files_are_refused(tmp_path, document):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"results.json.*another --out"):
        Scores(path)


def test_rows_may_come_from_a_later_version(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"format": 1, "rows": [{**ROW.to_dict(), "mood": "good"}]}))
    assert Scores(path).rows == [ROW]


def test_keys_tell_settings_apart():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1}) != key_of("a", {"x": 1, "y": 3})
