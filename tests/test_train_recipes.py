"""The script that trains every recipe in a process of its own: its rows, what it does with a process that dies."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "kernels" / "train_recipes.py"


@pytest.fixture
def script():
    found = importlib.util.spec_from_file_location("train_recipes", SCRIPT)
    assert found is not None and found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


def test_rows_come_as_processes_end_and_a_dead_one_is_a_row(script, monkeypatch, tmp_path):
    program = tmp_path / "child.py"
    program.write_text(
        "import json, sys\n"
        "name = sys.argv[-1]\n"
        "assert name != 'bad', 'no such kernel'\n"
        "print('words before'), print(json.dumps({'recipe': name, 'failures': []}))\n"
    )
    monkeypatch.setattr(script, "__file__", str(program))
    rows = {row["recipe"]: row for row in script.at_once(["one", "bad", "two"], 2, budget=60.0)}
    assert [rows[name]["failures"] for name in ("one", "two")] == [[], []] and rows["one"]["seconds"] > 0
    assert len(rows) == 3 and "exit code 1" in rows["bad"]["failures"][0]
    assert "no such kernel" in rows["bad"]["failures"][0]
    assert "no such kernel" in script.table([*rows.values()])
    late = list(script.at_once(["one"], 2, budget=-1.0))
    assert [row["failures"] for row in late] == [["not begun: the budget is spent"]]


def test_torch_forms_are_seen(script):
    from linearize.kernels import dispatch
    from linearize.kernels.gated_delta import delta_chunk

    x = torch.zeros(1, 3, 1, 16)
    docs, state = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 1, 16, 16)
    with dispatch.kernels("torch"), script.torch_forms() as forms:
        delta_chunk(x, x, x, x[..., 0], None, docs, state)
    assert forms["gated_delta._torch"] == 1 and forms["chunks.cut_documents"] == 1


@pytest.mark.slow
def test_a_recipe_in_triton_s_interpreter(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the script takes the GPU")
    command = [sys.executable, str(SCRIPT), "--recipes", "lolcats", "--out", str(tmp_path / "rows.json")]
    settings = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "LINEARIZE_COMPILE": "auto"}
    subprocess.run(command, check=True, env={**os.environ, **settings})
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["failures"] == [] and len(row["losses"]) == 2 and row["kernels"]["window_linear"] == 2
    assert row["operations"][0] == row["operations"][1] and row["decoded"] == 6
