"""The decoding benchmark without a GPU: every way on a tiny model, the table, and what happens when time runs out."""

from __future__ import annotations

import time

import pytest
import tiny
import torch

from linearize import cli, surgery
from linearize.bench.clock import Ceilings
from linearize.bench.decode import STATIC, Way, compared, floor, measure, said
from linearize.bench.subjects import converted, random_model
from linearize.decode.ways import SKIPPED, Point, Stamps, generate, graph, half, loop

POINTS = [Point(1, 9, 10), Point(2, 30, 10)]


@pytest.fixture(scope="module")
def pair():
    return converted(random_model("cpu", torch.float32, **tiny.COMMON, head_dim=8), "lolcats")


def test_every_way_measures_and_the_cache_of_ours_stays(pair):
    student, teacher = pair
    ways = [
        Way("converted", "graph", graph(student, None)),
        Way("teacher", STATIC, generate(teacher, cache_implementation="static", disable_compile=True)),
        Way("teacher", "loop", loop(teacher, backend="eager"), compiles=True),
        Way("teacher", "generate", generate(teacher)),
        Way("converted", "generate", generate(student), batches=(2,)),
    ]
    rows = list(measure(ways, POINTS))
    assert len(rows) == 9 and all(row["tokens/s"] > 0 and not row["note"] for row in rows), rows
    held = {(row["model"], row["way"], row["batch"]): row["cache MiB"] for row in rows}
    assert held["converted", "graph", 2] == pytest.approx(2 * held["converted", "graph", 1], rel=0.1)
    assert held["teacher", "loop", 2] > 2.2 * held["teacher", "loop", 1]
    table = compared([row | floor(row, teacher, 1e12) for row in rows])
    assert [row["batch"] for row in table] == sorted(row["batch"] for row in rows)
    assert all(
        (row["times the teacher"] == 1.0) == (row["way"] == STATIC) or row["times the teacher"] > 0
        for row in table
    )
    assert all(row["floor ms"] >= 0 for row in table)
    assert "tokens/s" in said(rows[0])


def test_failures_and_missing_time_are_notes():
    def fails(point: Point):
        raise RuntimeError(f"out of memory at {point.context}\nand more")

    rows = list(measure([Way("teacher", "fails", fails)], POINTS))
    assert [row["note"] for row in rows] == [f"RuntimeError: out of memory at {x}" for x in (9, 30)]
    rows = list(measure([Way("teacher", "fails", fails)], POINTS, time.monotonic() - 1))
    assert [row["note"] for row in rows] == ["no time left"] * 2 and "no time left" in said(rows[0])
    assert floor(rows[0], None, 1.0) == {"floor ms": None}


def test_what_compiles_comes_last_but_for_the_ends():
    order = []
    points = [Point(1, context, 4) for context in (1, 2, 3)]

    def way(name: str, compiles: bool) -> Way:
        def note(point: Point):
            order.append((name, point.context))
            return 1.0, 1

        return Way("teacher", name, note, compiles=compiles)

    list(measure([way("slow", True), way("quick", False)], points))
    assert order == [("slow", 1), ("slow", 3), ("quick", 1), ("quick", 3), ("quick", 2), ("slow", 2)]


def test_the_first_tokens_are_not_timed():
    stamps = Stamps()
    for i in range(SKIPPED + 4):
        stamps.add(1)
        stamps.times[-1] = 100.0 * i if i < SKIPPED else 2000.0 + i
    assert stamps.seconds() == pytest.approx(1.0)
    stamps.put(torch.zeros(2, 5))
    assert stamps.counts[-1] == SKIPPED + 4, "a prompt is no token"
    with pytest.raises(ValueError, match="too few"):
        Stamps([1.0], [1]).seconds()


def test_the_command_writes_its_table(monkeypatch, tmp_path, capsys):
    from linearize.bench import clock, decode

    class Clock:
        other = None

        def __init__(self, spend: float) -> None:
            self.other = torch.zeros(1)

        def ceilings(self) -> Ceilings:
            return Ceilings(1e12, 1e14)

        def describe(self) -> dict:
            return {"name": "a device"}

    monkeypatch.setattr(clock, "CudaClock", Clock)
    monkeypatch.setattr(clock, "require_cuda", lambda: None)
    monkeypatch.setattr(decode, "models", lambda path, teacher, recipe, shape: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(
        decode, "ways", lambda s, t: [Way("converted", "graph", lambda point: (0.002, 2**20))]
    )
    arguments = ["bench", "decode", "random", "--batch", "1,8", "--context", "16", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "500" in capsys.readouterr().out
    assert "| 4,000 |" in (tmp_path / "decode.md").read_text()
    assert '"tokens/s": 4000.0' in (tmp_path / "decode.json").read_text()


def test_a_checkpoint_is_halved_but_for_its_mixers():
    model = half(surgery.convert(tiny.model(), tiny.LOLCATS))
    kinds = {name.split(".mixer.")[0] != name: x.dtype for name, x in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
