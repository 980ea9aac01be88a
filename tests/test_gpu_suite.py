"""The order of the GPU suite, and what its results say."""

from __future__ import annotations

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
