"""Peers that tune themselves: among all of their kernels' configurations, or among few, which their row says."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from linearize.bench import report
from linearize.bench.case import Case, Contender
from linearize.bench.clock import Ceilings, Timing
from linearize.bench.peers import fla
from linearize.bench.runner import Options, run

CEILINGS = Ceilings(bandwidth=3e12, operations=8e14)


class Once:
    """Calls once and says a millisecond."""

    device, dtype = "cpu", torch.float32

    def time(self, call) -> Timing:
        call()
        return Timing(1.0, 0.9, 1.1, 0.1, 1)

    def peak(self, call) -> float:
        return 12.0

    def finish(self) -> None:
        pass

    def release(self) -> None:
        pass


def twice() -> Case:
    contenders = (
        Contender("linearize", lambda inputs: lambda: inputs["x"] * 2, kind="ours"),
        Contender("fla", lambda inputs: lambda: fla("ops.known", "known")(inputs["x"]), kind="tuned"),
    )
    return Case(
        "twice",
        "T=8",
        8,
        lambda draw: {"x": draw.normal(3)},
        ("x",),
        (12, 30),
        (0, 0),
        contenders,
        swept=False,
    )


def test_a_peer_tunes_among_few_of_its_configurations_and_its_row_says_so(monkeypatch):
    """Others' tuners keep theirs, and so does a peer that nobody restricts."""
    autotuner = pytest.importorskip("triton.runtime.autotuner")

    class Tuner(autotuner.Autotuner):
        def __init__(self, module, count):
            self.base_fn = types.SimpleNamespace(__module__=module, __name__="some_kernel")
            self.configs = list(range(count))

    theirs, few, other = Tuner("fla.ops.gsa.chunk", 40), Tuner("fla.ops.gsa.chunk", 2), Tuner("torch.x", 40)
    module = types.ModuleType("fla.ops.known")
    module.known = lambda x: x * 2
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.known", module)
    rows = run([twice()], Once(), Options())
    assert len(theirs.configs) == 40 and [row.tuned_among for row in rows] == [None, None]
    assert "tuned among" not in report.text(rows, CEILINGS)
    rows = run([twice()], Once(), Options(configurations=5))
    assert [len(tuner.configs) for tuner in (theirs, few, other)] == [5, 2, 40]
    assert sorted(set(theirs.configs)) == theirs.configs
    assert [row.tuned_among for row in rows] == [None, 5]
    assert [row.get("tuned_among") for row in report.to_json(rows, CEILINGS)] == [None, 5]
    assert "fla: tuned among 5 configurations" in report.text(rows, CEILINGS)
