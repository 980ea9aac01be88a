"""The benchmark without a GPU: every case makes its calls at a tiny size, failures become notes, files are written."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cache

import pytest
import torch

from linearize import cli
from linearize.bench import clock as timing
from linearize.bench import report
from linearize.bench.agreement import disagreement
from linearize.bench.case import Case, Contender, Draw, NotAvailable, traffic
from linearize.bench.cases import all_cases, operators
from linearize.bench.clock import Ceilings, Timing
from linearize.bench.peers import composed, fla
from linearize.bench.plot import draw
from linearize.bench.runner import Options, limit, run
from linearize.bench.shapes import Shape, attention_flops, sized
from linearize.kernels import dispatch

CEILINGS = Ceilings(bandwidth=3e12, operations=8e14)
ABOUT = report.facts({"name": "a device"}, CEILINGS, {"quick": True})


class Fake:
    """Calls once and says a millisecond; peers take twice as long."""

    device, dtype = "cpu", torch.float32

    def __init__(self) -> None:
        self.timed = 0

    def time(self, call) -> Timing:
        call()
        self.timed += 1
        return Timing(1.0, 0.9, 1.1, 0.1, 1)

    def peak(self, call) -> float:
        call()
        return 12.0

    def finish(self) -> None:
        pass

    def release(self) -> None:
        pass


class OnCpu(Fake):
    """What the command line gets in the place of the CUDA clock."""

    def __init__(self, spend: float = 0.0) -> None:
        super().__init__()

    def describe(self):
        return {"name": "a device"}

    def ceilings(self):
        return CEILINGS


WINDOWS = ("window_256_512", "window_128_256", "window", "window_256", "window_1024", "window_pinned")
"""They call their kernel whatever is asked for: seconds each on Triton's interpreter, the first one least."""


@cache
def tiny() -> tuple[Case, ...]:
    return tuple(all_cases(64, (64,)))


def one(name: str, kind: str = "peer", **changes) -> Contender:
    def build(inputs):
        return lambda: inputs["x"] * 2

    return Contender(name, changes.pop("build", build), kind=kind, **changes)


def case(*contenders: Contender, length: int = 2048, operator: str = "twice") -> Case:
    return Case(
        operator,
        f"T={length}",
        length,
        lambda draw: {"x": draw.normal(3)},
        ("x",),
        (12, 30),
        (0, 0),
        contenders,
        swept=True,
    )


def failing(error: BaseException):
    def build(inputs):
        raise error

    return build


def test_what_the_issue_asks_for_is_registered():
    cases = all_cases()
    assert {"window_linear", "window_linear_128", "window_linear_llama3_8b", "linear_features", "linear"} <= {
        *operators(cases)
    }
    assert {
        "gated_linear",
        "gated_linear_per_head",
        "gated_delta",
        "generalized_delta",
        "gdn2",
        "kda",
        "log_linear",
        "log_linear_delta",
        "taylor_linear",
        "short_conv",
        "distill",
    } <= {*operators(cases)}
    swept = [case for case in cases if case.operator == "window_linear"]
    assert [case.length for case in swept] == [2**power for power in range(10, 17)]
    assert all(case.contenders[0].kind == "ours" for case in cases)
    assert all([other.kind for other in case.contenders].count("ours") == 1 for case in cases)
    assert any(case.size.startswith("B=2 T=16,384 H=16 D=128") for case in cases if case.operator == "linear")


SMALL = [
    *(case for case in tiny() if "128,256" not in case.size and case.operator not in WINDOWS),
    *(case for case in all_cases(16, (16,)) if case.operator in WINDOWS),
]
"""All but the largest vocabulary, whose head alone is a gigabyte."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow)
        if "256,000" in case.size or case.operator in WINDOWS[1:]
        else case
        for case in SMALL
    ],
    ids=lambda case: f"{case.operator}-{case.size}",
)
def test_ours_runs_both_ways_and_is_right(case):
    """The torch forms here; on a GPU the same calls launch the kernels."""
    with dispatch.kernels("torch"):
        assert disagreement(case, case.contenders[0], Draw("cpu", torch.float32)) < 1e-6
        rows = run([replace(case, contenders=case.contenders[:1])], Fake(), Options())
    assert rows[0].forward and rows[0].both and rows[0].peak_mib == 12.0
    assert not rows[0].forward_note and not rows[0].both_note


def test_a_wrong_result_shows():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * 2

        @staticmethod
        def setup_context(*_):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (3 if gradient.dtype == torch.bfloat16 else 2)

    right, wrong = (
        one("linearize", "ours", build=build) for build in (lambda x: lambda: x["x"] * 2, _applied(Wrong))
    )
    assert disagreement(case(right), right, Draw("cpu")) < 0.01
    assert disagreement(case(wrong), wrong, Draw("cpu")) == pytest.approx(0.5, abs=0.01)
    rows = run([case(right)], Fake(), Options())
    rows[0].error = 0.5
    assert any("WRONG RESULTS" in note for note in report.notes(rows))
    rows[0].error = float("nan")
    assert any("WRONG RESULTS" in note for note in report.notes(rows))


def _applied(function):
    return lambda inputs: lambda: function.apply(inputs["x"])


def test_whatever_stops_one_contender_is_its_note_and_stops_no_other():
    peers = {
        "a": (RuntimeError("not on Hopper"), "refused: RuntimeError: not on Hopper"),
        "b": (NotAvailable("no such package"), "not available: no such package"),
        "c": (torch.OutOfMemoryError("tried to allocate 80 GiB"), "out of memory: tried to allocate 80 GiB"),
    }
    contenders = [
        one("linearize", "ours"),
        *(one(name, build=failing(x)) for name, (x, _) in peers.items()),
        one("last"),
    ]
    rows = {row.contender.name: row for row in run([case(*contenders)], Fake(), Options())}
    assert rows["linearize"].forward and rows["last"].both
    for name, (_, note) in peers.items():
        assert rows[name].forward is None and rows[name].forward_note == note == rows[name].both_note
    table = report.text(list(rows.values()), CEILINGS)
    assert all(note in table for _, note in peers.values())


def test_a_refused_backward_keeps_its_forward():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("gated backward is refused on Hopper")

    rows = run([case(one("linearize", "ours"), one("fla", build=_applied(Forward)))], Fake(), Options())
    assert rows[1].forward is not None and rows[1].both is None and not rows[1].forward_note
    assert rows[1].both_note.startswith("refused: RuntimeError: gated backward is refused")


def test_ours_comes_first_and_self_tuning_peers_last():
    order: list[str] = []

    def noted(name):
        def build(inputs):
            order.append(name)
            return lambda: inputs["x"] * 2

        return build

    contenders = [
        one(name, kind, build=noted(name)) for name, kind in (("t", "tuned"), ("o", "ours"), ("p", "peer"))
    ]
    rows = run([case(*contenders), case(*contenders, length=1024)], Fake(), Options())
    assert "".join(dict.fromkeys(order)) == "opt"
    assert [row.contender.name for row in rows] == ["t", "o", "p", "t", "o", "p"]
    assert rows[0].forward and "--peers-at" in rows[3].forward_note
    assert not run([case(*contenders)], Fake(), Options(peers_at=(0,)))[0].forward


def test_the_budget_and_a_lost_device_leave_the_rest_listed():
    contenders = [one("linearize", "ours"), one("other")]
    rows = run([case(*contenders)], Fake(), Options(budget=-1.0))
    assert [row.forward_note for row in rows] == ["not run: the budget of -1 s is spent"] * 2
    broken = one(
        "linearize",
        "ours",
        build=failing(RuntimeError("CUDA error: an illegal memory access was encountered")),
    )
    rows = run([case(broken, one("other"))], Fake(), Options())
    assert "left the device unusable" in rows[1].forward_note


def test_softmax_is_timed_once_for_all_operators():
    fake, shared = Fake(), one("SDPA", shared=True)
    rows = run([case(shared), case(shared, operator="again")], fake, Options())
    assert fake.timed == 2 and rows[0].forward == rows[1].forward and rows[1].both


def test_a_first_call_has_a_time_limit():
    def slow(inputs):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            pass

    rows = run(
        [case(one("linearize", "ours"), one("fla", "tuned", build=slow))], Fake(), Options(warm_up=0.2)
    )
    assert rows[1].forward_note == "stopped: the first call was not done after 0.2 s (--warm-up)"
    with limit(5.0):
        pass


def test_only_compiling_times_nothing():
    fake = Fake()
    rows = run([case(one("linearize", "ours"))], fake, Options(only_compile=True))
    assert fake.timed == 0 and rows[0].forward is None and rows[0].forward_note.startswith("compiled in")


def test_files_are_written(tmp_path):
    cases = [case(one("linearize", "ours"), one("SDPA flash"), one("fla", "tuned", build=failing(NotAvailable("none"))),
                  length=length, operator="window_linear") for length in (1024, 2048, 4096)]  # fmt: skip
    rows = run(cases, Fake(), Options())
    entries = report.to_json(rows, CEILINGS)
    report.write_json(tmp_path / "kernels.json", ABOUT, entries)
    read = json.loads((tmp_path / "kernels.json").read_text())
    assert {"device", "versions", "command", "date", "ceilings", "options", "rows"} <= set(read)
    assert read["rows"][0]["forward_ms"]["median"] == 1.0 and read["rows"][1]["forward_to_ours"] == 1.0
    assert read["rows"][5]["forward_note"] == "not available: none"
    page = report.markdown(ABOUT, rows, CEILINGS)
    assert "not available: none" in page and "| linearize | 1.00 |" in page and "3.00 TB/s" in page
    assert draw(entries, tmp_path / "kernels.png", "title") == tmp_path / "kernels.png"
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    assert draw([], tmp_path / "nothing.png") is None
    table = report.write_rows(tmp_path / "new", "decode", ABOUT, [{"batch": 1, "tokens/s": 812.5}])
    assert "812" in table and (tmp_path / "new" / "decode.json").is_file()


def test_floors_of_the_shape_that_the_peers_were_timed_at():
    shape = sized(65_536, 8192, 16, 64)
    forward, both = shape.bytes()
    assert (forward, both) == (4 * 2**27, 11 * 2**27)
    assert CEILINGS.floor(forward, 0) == (pytest.approx(0.179, abs=1e-3), "bytes")
    assert CEILINGS.floor(0, 8e11) == (1.0, "operations")
    grouped = Shape(1, 16, 32, 128, 8).bytes()[0]
    assert grouped == 2 * 128 * 16 * (32 + 8 + 8 + 32)
    flops = attention_flops(shape, features=128, map_dim=64, window=64)
    assert flops[0] == shape.rows * (4 * 64 * 64 + 4 * 128 * 64 + 4 * 64 * 64) and flops[1] > 3 * flops[0]
    assert traffic(6, 2) == (8, 22)


def test_the_plain_features_of_the_composed_peer_are_ours(monkeypatch):
    from linearize.bench import peers

    case = next(case for case in tiny() if case.operator == "linear_features")
    inputs = case.inputs(Draw("cpu", torch.float32))

    def chunk_linear_attn(q, k, v, scale, normalize):
        weights = (torch.einsum("bthf,bshf->bhts", q, k) * scale).tril()
        return torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v), None

    monkeypatch.setattr(peers, "fla", lambda module, name: chunk_linear_attn)
    torch.testing.assert_close(composed(inputs)(), case.contenders[0].build(inputs)(), atol=1e-5, rtol=1e-4)


def test_levels_are_those_of_the_peer():
    """fla's own definition, a loop over levels: the same numbers, so that the same thing is timed."""
    case = next(case for case in tiny() if case.operator == "log_linear")
    inputs = case.inputs(Draw("cpu", torch.float32))
    q, k, v, shares = (inputs[name].double() for name in ("q", "k", "v", "shares"))
    since, tokens = inputs["log_decay"].double().cumsum(1), q.shape[1]
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)
    weights = torch.zeros(len(q), tokens, tokens, q.shape[2], dtype=torch.float64)
    for level in range(shares.shape[-1]):
        half = 1 << (level - 1) if level else 0
        begins = rows - rows % half if level else rows
        on = (
            (rows % (2 * half) >= half) & (columns < begins) & (columns >= begins - half)
            if level
            else rows == columns
        )
        weights += on[None, :, :, None] * shares[:, :, None, :, level]
    decay = (since[:, :, None] - since[:, None]).clamp_max(0).exp()
    expected = torch.einsum("btsh,bthd,bshd,bshv->bthv", weights * decay, q, k, v)
    with dispatch.kernels("torch"):
        found = case.contenders[0].build(inputs)()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_missing_peer_says_what_to_install():
    with pytest.raises(NotAvailable, match=r"pip install fla-core==0\.6\.0"):
        fla("ops.of_nothing", "chunk")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_what_is_needed(capsys):
    assert cli.main(["bench", "kernels"]) == 2
    said = capsys.readouterr().err
    assert "needs a CUDA device" in said and "compute capability 8.0" in said and "kernels-h100.md" in said


def test_the_command_writes_its_files(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "CudaClock", OnCpu)
    arguments = [
        "bench",
        "kernels",
        "--only",
        "short_conv",
        "--tokens",
        "64",
        "--quick",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(arguments) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"kernels.json", "kernels.md"}
    out = capsys.readouterr().out
    assert "short_conv: B=1 T=64" in out and "torch conv1d, three" in out
    assert cli.main(["bench", "kernels", "--only", "short_cov"]) == 2
    assert "did you mean 'short_conv'?" in capsys.readouterr().err


def test_what_is_interrupted_still_shows(capsys, monkeypatch, tmp_path):
    class Stopped(OnCpu):
        def time(self, call):
            if self.timed:
                raise KeyboardInterrupt
            return super().time(call)

    monkeypatch.setattr(timing, "CudaClock", Stopped)
    assert (
        cli.main(["bench", "kernels", "--only", "short_conv", "--tokens", "64", "--out", str(tmp_path)])
        == 130
    )
    assert (tmp_path / "kernels.md").is_file()


def test_bench_without_a_name_shows_help(capsys):
    assert cli.main(["bench"]) == 0
    out = capsys.readouterr().out
    assert "kernels" in out and "decode" in out
