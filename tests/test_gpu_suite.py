"""The order of the GPU suite, and what its results say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_suite


def test_what_needs_a_card_comes_first_and_what_takes_long_anywhere_last():
    names = [
        ("tests/kernels/test_newest.py::test_a", False),
        ("tests/kernels/test_kda_triton.py::test_a", False),
        ("tests/kernels/test_launch.py::test_a", False),
        ("tests/mixers/test_fused.py::test_a", False),
        ("tests/decode/test_engine.py::test_a", False),
        ("tests/mixers/test_contract.py::test_a", False),
        ("tests/kernels/test_newest.py::test_b", True),
    ]
    places = [gpu_suite.place(name, slow) for name, slow in names]
    assert places == sorted(places) and len(set(places)) == len(places)
    assert gpu_suite.place("tests/distill/test_captured.py::test_a", False) < places[-2]


def test_results_are_a_line_a_test(tmp_path):
    lines = [f"PASSED\t0.5\ttests/a.py::test_many[{n}]" for n in range(gpu_suite.MANY + 1)]
    lines += ["FAILED\t1.0\ttests/a.py::test_one", "PASSED\t2.0\ttests/b.py::test_b[x y]"]
    lines += ["FAILED\t1.0\ttests/b.py::test_b[x y]", "PASSED\t3.0\ttests/b.py::test_b[x y]"]
    lines += ["SKIPPED\t0.0\ttests/b.py::test_c"]
    (tmp_path / "results.tsv").write_text("\n".join(lines) + "\n")
    assert [*gpu_suite.table(gpu_suite.results(tmp_path))] == [
        f"{gpu_suite.MANY + 2} passed, 1 failed, 1 skipped",
        "FAILED tests/a.py::test_one",
        f"PASSED {gpu_suite.MANY + 1} of tests/a.py::test_many (20 s)",
        "FAILED tests/a.py::test_one (1.0 s)",
        "PASSED tests/b.py::test_b[x y] (3.0 s)",
        "SKIPPED tests/b.py::test_c (0.0 s)",
    ]
    lines[0] = lines[0].replace("PASSED", "FAILED")
    (tmp_path / "results.tsv").write_text("\n".join(lines) + "\n")
    assert len([*gpu_suite.table(gpu_suite.results(tmp_path))]) == gpu_suite.MANY + 1 + 2 + 4


def test_tracebacks_are_there_whatever_ends_the_suite(tmp_path):
    """As when its limit is over: pytest is killed before it has printed a failure."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import time\n"
        "def test_wrong():\n    print('seen', 'there')\n    left = 3\n    assert left == 4, 'no four'\n"
        "def test_long():\n    time.sleep(600)\n"
    )
    environment = os.environ | {
        "LINEARIZE_GPU_SUITE": str(tmp_path), "LINEARIZE_GPU_CARDS": "", "PYTHONPATH": str(Path(__file__).parent),
    }  # fmt: skip
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    written = tmp_path / "failures.txt"
    options = ["-q", "-p", "gpu_suite", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    command = [sys.executable, "-m", "pytest", *options, "tests"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as suite:
        try:
            for _ in range(1200):
                if written.is_file() and written.stat().st_size:
                    break
                assert suite.poll() is None
                time.sleep(0.1)
        finally:
            suite.send_signal(signal.SIGKILL)
    text = written.read_text()
    assert text.startswith("=== tests/test_some.py::test_wrong (call, ") and "AssertionError: no four" in text
    assert "assert left == 4" in text and "seen there" in text
    assert (tmp_path / "results.tsv").read_text().startswith("FAILED\t")
