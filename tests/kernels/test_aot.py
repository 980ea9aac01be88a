"""Kernels compile for sm_90 and sm_80 without a GPU: shared memory fits, nothing spills, products run on tensor cores.

Not every call of `aot_calls` is compiled here, since a large kernel takes ten seconds: the shapes that training meets
are. `python scripts/kernels/aot.py` compiles all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton to compile")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "kernels" / "aot.py"
COMPILED = {
    "90, window": (90, ["window_linear:dim 64", "window_linear:dim 128", "window_linear_step:one row"]),
    "90, gated": (
        90,
        [
            "gated_linear:key, 64",
            "gated_linear:head, 64",
            "gated_delta:dim 64",
            "gated_delta:per key, dim 64",
            "taylor_linear:dim 16",
        ],
    ),
    "90, generalized": (90, ["generalized_delta:dim 64", "generalized_delta:one token, dim 64"]),
    "80, all": (
        80,
        ["window_linear:dim 64", "gated_linear:none, 64", "short_conv:documents", "distill:float32"],
    ),
}
"""Architecture and calls; each group is one process."""
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28),
}  # fmt: skip
"""For glibc: calls take and give back large tensors, and half of the time went into pages that were made anew."""


def aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, where kernels are compiled and not interpreted."""
    environment = {**os.environ, **KEPT, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--jobs", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("group", COMPILED)
def test_kernels_compile_within_the_limits(group, tmp_path):
    arch, calls = COMPILED[group]
    done = aot("--arch", str(arch), "--only", *calls, "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["module"] for row in rows} == {call.partition(":")[0] for call in calls}
    assert any(row["has_dots"] for row in rows) and all(row["dots"] > 0 for row in rows if row["has_dots"])
    assert all(0 < row["registers"] <= 255 for row in rows)
    starved = [row["kernel"] for row in rows if row["registers"] <= 32 and row["spills"]]
    assert not starved, "ptxas takes 32 registers on sm_80 unless a launch says how many it may take"


@pytest.mark.slow  # a minute of making every call's tensors
def test_every_kernel_is_among_the_calls():
    """A kernel that no call launches would never be compiled before it meets a GPU."""
    done = aot("--list")
    assert done.returncode == 0, done.stderr[-2000:]
    listed = {line.rpartition(": ")[2] for line in done.stdout.splitlines()}
    written = {
        f"{path.parent.name}.{name}"
        for path in (ROOT / "kernels").glob("*/triton_*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert written and written - listed == set()


PLANTED = """
import torch, triton, triton.language as tl
from linearize.kernels.launch import launch

@triton.jit
def spilling_kernel(x, y, N: tl.constexpr):
    place = tl.arange(0, N)
    a = tl.load(x + place[:, None] * N + place[None, :])
    b = tl.load(y + place[:, None] * N + place[None, :])
    c = tl.dot(a, b)
    for _ in range(4):
        c = tl.dot(c.to(tl.bfloat16), a) * c + tl.dot(b, c.to(tl.bfloat16))
    tl.store(x + place[:, None] * N + place[None, :], c.to(tl.bfloat16))

@triton.jit
def broken_kernel(x, WIDE: tl.constexpr):
    y = tl.load(x + tl.arange(0, 16))
    if WIDE:
        y = tl.load(x + tl.arange(0, 32)) + y
    tl.store(x + tl.arange(0, 16), y)

def both():
    x = torch.zeros(128, 128, dtype=torch.bfloat16)
    launch(spilling_kernel, (1,), x=x, y=x, N=128, num_warps=2, num_stages=1)
    launch(broken_kernel, (1,), x=x, WIDE=True)

CALLS = {"planted": both}
"""


def test_what_breaks_a_rule_fails(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    done = aot("--calls", str(tmp_path), "--arch", "90")
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert re.search(r"spilling_kernel sm_90: \d+ bytes of spills", done.stdout)
    assert "broken_kernel sm_90: does not compile: CompilationError" in done.stdout


def test_rules():
    found = importlib.util.spec_from_file_location("aot", SCRIPT)
    assert found is not None and found.loader is not None
    aot = importlib.util.module_from_spec(found)
    sys.modules["aot"] = aot  # dataclasses look their module up
    try:
        found.loader.exec_module(aot)
    finally:
        del sys.modules["aot"]
    row = aot.Compiled(
        "m", "c", "k", 80, 4, 2, shared=166_912, registers=255, spills=60, dots=4, has_dots=True
    )
    assert row.problems() == [] and row.problems(strict=True) == ["m, 'c': k sm_80: 60 bytes of spills"]
    worse = aot.Compiled("m", "c", "k", 80, 4, 2, shared=166_913, registers=255, spills=64, has_dots=True)
    assert [problem.split(": ")[-1] for problem in worse.problems()] == [
        "166913 bytes of shared memory, over 166912",
        "64 bytes of spills",
        "matrix products, but no tensor-core instruction",
    ]
    for (name, arch), most in aot.LET_PASS.items():
        operator, _, kernel = name.partition(".")
        passes = aot.Compiled("m", "c", kernel, arch, 4, 2, spills=most, operator=operator)
        assert most >= aot.SPILLS and passes.problems() == [] and len(passes.problems(strict=True)) == 1
        for other in (
            replace(passes, spills=most + 1), replace(passes, operator="other"), replace(passes, kernel="other"),
        ):  # fmt: skip
            assert len(other.problems()) == 1
    assert aot.takes_tensor_cores("%1 = tt.dot %a, %b, %c : tensor<64x64xbf16> * tensor<64x64xbf16>")
    assert not aot.takes_tensor_cores(
        "%1 = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<16x16xf32> * tensor<f32>"
    )
    log = "ptxas info : Used 96 registers\n 0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads"
    assert aot.resources(log) == (96, 20)
    with pytest.raises(RuntimeError, match="nothing about registers"):
        aot.resources("")
