"""Prefill and decoding by recipe without a GPU: rows of a tiny model, prompts in pieces, what no graph holds."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading

import pytest
import torch
from filelock import FileLock

from linearize import cli
from linearize.bench import decode_recipes
from linearize.bench.decode_recipes import prefill, random_tokens, read_prompt
from linearize.bench.subjects import TEACHER, convert, random_model
from linearize.bench.whole import Budget, Stopwatch

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shape", "tiny", "--batch", "1,2", "--context", "9", "--prefill", "16,40"]


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Few repeats."""
    own = decode_recipes.Stopwatch
    monkeypatch.setattr(decode_recipes, "Stopwatch", lambda device, **_: own(device, spend=0.0, most=1))


@pytest.mark.slow
def test_rows_of_prefill_and_decoding_stand_beside_those_of_training(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    train = ["bench", "recipes", "--device", "cpu", "--shape", "tiny", "--length", "16", "--batch", "1"]
    assert cli.main([*train, "--recipes", "swa_sinks", *out]) == 0
    # kept softmax layers, pinned tokens, and softmax run by a mixer
    names = ["mamba_in_llama", "gated_delta_window", "softmax"]
    assert cli.main(["bench", "decode", "random", *TINY, "--recipes", ",".join(names), *out]) == 0
    rows = json.loads((tmp_path / "recipes.json").read_text())
    assert [row["measured"] for row in rows[:2]] == ["train"] * 2
    kinds = [("prefill", 1, 16), ("prefill", 1, 40), ("decode", 1, 9), ("decode", 2, 9)]
    found = [(row["recipe"], row["measured"], row["batch"], row["length"]) for row in rows[2:]]
    assert found == [(name, *kind) for name in [TEACHER, *names] for kind in kinds]
    for row in rows[2:]:
        assert row["tokens_per_second"] > 0 and row["ratio"] > 0 and not row["note"]
    page = (tmp_path / "recipes.md").read_text()
    assert all(f"## {kind}, tiny, " in page for kind in ("train", "prefill", "decode"))
    assert "gated_delta_window" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lolcats_terraced", "gated_deltanet", "mohawk", TEACHER])
def test_a_prompt_in_pieces_is_the_prompt(name):
    model = convert(random_model(CPU, torch.float32, "tiny"), name)
    ids = random_tokens(model, 1, 150)
    whole = prefill(model, ids, 150)
    assert whole.shape[1] == 1
    torch.testing.assert_close(prefill(model, ids, 47)[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)


def test_a_prompt_that_does_not_fit_is_halved(monkeypatch):
    seen = []

    def bounded(model, ids, piece):
        seen.append(piece)
        if piece > 3000:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(decode_recipes, "prefill", bounded)
    model = random_model(CPU, torch.float32, "tiny")
    row = read_prompt(model, 10_000)
    assert seen[:3] == [10_000, 5000, 2500] and row["note"] == "in pieces of 2,500 tokens"
    assert math.isfinite(row["tokens_per_second"])
    monkeypatch.setattr(decode_recipes, "SMALLEST", 5000)
    with pytest.raises(torch.OutOfMemoryError):
        read_prompt(model, 10_000)


@pytest.mark.parametrize(
    ("compiled", "ways"),
    [(None, ["graph"]), ("too", ["graph", "graph, compiled"]), ("alone", ["graph, compiled"])],
)
def test_nothing_is_begun_behind_the_budget(compiled, ways):
    options = argparse.Namespace(
        shape="tiny", prefill=(8,), batch=(1,), context=None, compile=compiled, only=False, profile=False
    )
    rows = list(decode_recipes.rows("lolcats", options, CPU, Budget(-1.0)))
    assert [row["way"] for row in rows] == ["chunked", *ways]
    assert all(row["note"] == "not run: the budget is spent" for row in rows)


def test_a_profile_says_what_a_token_takes(tmp_path, capsys):
    arguments = [*TINY[:4], "--only", "--profile", "--recipes", "gla", "--batch", "1", "--prefill", "16"]
    assert cli.main(["bench", "decode", "random", *arguments, "--context", "9", "--out", str(tmp_path)]) == 0
    [row] = json.loads((tmp_path / "recipes-profile.json").read_text())
    assert {"measured": "decode", "recipe": "gla", "way": "graph", "tokens": 16}.items() <= row.items()
    assert len(row["longest"]) == 12 and row["kernels"] > 16 and row["weights_mib"] > 0
    rows = json.loads((tmp_path / "recipes.json").read_text())
    assert [row["measured"] for row in rows] == ["prefill", "decode"]
    assert all("profile" not in row for row in rows)
    assert "kernels a token" in capsys.readouterr().out


def test_a_checkpoint_is_refused(tmp_path, capsys):
    assert cli.main(["bench", "decode", "runs/mine", "--recipes", "all", *TINY]) == 2
    assert "--recipes goes with random in the place of runs/mine" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_a_folder_and_take_turns(tmp_path):
    """Rows of all of them stay; none measures the teacher; what one times the others wait for."""
    command = [
        sys.executable, "-m", "linearize", "bench", "decode", "random", "--only", "--shape", "tiny", "--device", "cpu",
        "--batch", "1", "--context", "16", "--prefill", "16", "--out", str(tmp_path), "--recipes",
    ]  # fmt: skip
    started = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in ("lolcats", "gla")
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    rows = json.loads((tmp_path / "recipes.json").read_text())
    assert {(row["recipe"], row["measured"]) for row in rows} == {
        (recipe, measured) for recipe in ("lolcats", "gla") for measured in ("prefill", "decode")
    }
    assert all(row["tokens_per_second"] for row in rows)


def test_nobody_times_out_of_turn(tmp_path):
    watch = Stopwatch(torch.device("cpu"), spend=0.0, turn=tmp_path / "turn.lock")
    seen = []
    with FileLock(tmp_path / "turn.lock"):
        other = threading.Thread(target=lambda: watch.seconds(lambda: seen.append(1), 0.0))
        other.start()
        other.join(0.2)
        assert not seen
    other.join(200)
    assert seen
