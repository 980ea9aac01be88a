"""The recipes' benchmark without a GPU: rows of a tiny model, failures, and files that grow."""

from __future__ import annotations

import argparse
import json

import pytest
import replayed
import torch
from filelock import FileLock, Timeout
from on_device import META, OnDevice, no_autocast

from linearize import cli
from linearize.bench import recipes, training_step, whole
from linearize.bench.subjects import (
    SHAPES,
    TEACHER,
    VARIANTS,
    chosen,
    convert,
    layers_of_each,
    mixers_of,
    random_model,
    subjects,
)
from linearize.distill import blocks, captured
from linearize.errors import LinearizeError
from linearize.kernels import dispatch
from linearize.kernels.distill import Head
from linearize.mixers import check
from linearize.objectives import headless

TINY = ["--device", "cpu", "--shape", "tiny", "--length", "32"]


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Few repeats."""
    own = training_step.Stopwatch
    monkeypatch.setattr(training_step, "Stopwatch", lambda device, **given: own(device, spend=0.0, **given))


def bench(out, *arguments: str) -> list[dict]:
    assert cli.main(["bench", "recipes", *TINY, "--out", str(out), *arguments]) == 0
    return json.loads((out / "recipes.json").read_text())


@pytest.mark.slow
def test_rows_of_training_and_what_was_measured_before_stay(tmp_path, capsys):
    rows = bench(tmp_path, "--recipes", "gated_delta_window", "--batch", "1,2", "--profile")
    assert [(row["recipe"], row["batch"]) for row in rows] == [
        (name, batch) for name in (TEACHER, "gated_delta_window") for batch in (1, 2)
    ]
    for row in rows:
        assert {
            "shape": "tiny",
            "length": 32,
            "measured": "train",
            "way": "bf16",
            "note": "",
        }.items() <= row.items()
        assert row["tokens_per_second"] > 0 and row["milliseconds"] > 0 and row["steps"] >= 3
    assert rows[0]["ratio"] == 1.0 and rows[2]["ratio"] > 0
    profile = json.loads((tmp_path / "recipes-profile.json").read_text())
    assert len(profile) == 4 and all(0 < row["busy"] <= 1 and len(row["longest"]) == 12 for row in profile)
    said = capsys.readouterr().out
    assert "gated_delta_window" in said and "x teacher" in said and "% busy" in said
    again = bench(
        tmp_path, "--recipes", "gated_delta_window_token", "--batch", "2", "--precision", "autocast"
    )
    assert len(again) == 6 and again[:4] == rows
    page = (tmp_path / "recipes.md").read_text()
    assert "## train, tiny, bf16" in page and "## train, tiny, autocast" in page


def test_every_subject_trains(tmp_path):
    """Of tiny widths: that each of them runs, both ways, under the loss that the benchmark takes."""
    device = torch.device("cpu")
    for name in subjects():
        model = recipes.build(name, "tiny", "bf16", device)
        loss = recipes.Step(model, device, "bf16").call(1, 24)()
        assert loss.isfinite(), name
        mixers = [p for n, p in model.named_parameters() if ".mixer." in n]
        assert all(p.dtype == torch.float32 for p in mixers), name
        assert not mixers or any(p.grad is not None and p.grad.isfinite().all() for p in mixers), name
        assert model.get_input_embeddings().weight.grad.dtype == torch.bfloat16


@pytest.mark.slow
def test_what_does_not_fit_is_halved_and_what_fails_is_a_row(monkeypatch, tmp_path):
    def measured(self, batch, length):
        if batch > 2:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return {**whole.empty(""), "tokens_per_second": 10.0 * batch, "milliseconds": 1.0}

    monkeypatch.setattr(recipes.Step, "measured", measured)
    rows = bench(tmp_path / "a", "--recipes", "lolcats", "--batch", "1,8", "--largest")
    assert [(row["batch"], row["note"]) for row in rows if row["recipe"] == "lolcats"] == [
        (8, "out of memory"), (4, "out of memory"), (2, "")
    ]  # fmt: skip
    rows = bench(tmp_path / "b", "--recipes", "lolcats", "--batch", "1,8")
    assert [(row["batch"], row["ratio"]) for row in rows if row["recipe"] == "lolcats"] == [
        (1, 1.0),
        (8, None),
    ]
    monkeypatch.setattr(
        recipes, "build", lambda *_: (_ for _ in ()).throw(LinearizeError("no kernel\nfor this"))
    )
    rows = bench(tmp_path / "c", "--recipes", "lolcats")
    assert [row["note"] for row in rows] == ["LinearizeError: no kernel for this"] * 2
    assert "no kernel for this" in (tmp_path / "c" / "recipes.md").read_text()


def test_a_lost_device_ends_the_command_and_keeps_its_rows(monkeypatch, tmp_path, capsys):
    def measured(self, batch, length):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench(tmp_path, "--recipes", "lolcats")
    monkeypatch.setattr(recipes.Step, "measured", measured)
    assert cli.main(["bench", "recipes", *TINY, "--out", str(tmp_path), "--recipes", "lolcats"]) == 2
    assert "illegal memory access" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "recipes.json").read_text())) == 2


def test_nothing_is_begun_behind_the_budget(tmp_path):
    options = argparse.Namespace(
        length=(8,),
        batch=(1, 2),
        largest=False,
        shape="tiny",
        precision="bf16",
        only=False,
        captured=False,
        compile=False,
    )
    rows = list(recipes.rows("lolcats", options, torch.device("cpu"), whole.Budget(-1.0)))
    assert [row["note"] for row in rows] == ["not run: the budget is spent"] * 2


def test_a_lower_ratio_is_slower_and_a_missing_batch_has_the_teachers_largest():
    def row(recipe: str, batch: int, speed: float | None) -> dict:
        return {"measured": "train", "shape": "s", "way": "w", "length": 1, "recipe": recipe, "batch": batch,
                "tokens_per_second": speed}  # fmt: skip

    rows = [
        row(TEACHER, 1, 10.0),
        row(TEACHER, 4, 20.0),
        row("a", 1, 5.0),
        row("a", 2, 5.0),
        row("a", 4, None),
    ]
    assert [found["ratio"] for found in whole.compared(rows)] == [1.0, 1.0, 0.5, 0.25, None]
    assert len(whole.merged(rows, row("a", 2, 6.0))) == 5


def test_names_of_subjects_and_shapes():
    assert {"lolcats", "softmax", *VARIANTS} <= set(subjects()) and "base" not in subjects()
    assert chosen([]) == chosen(["all"]) == subjects() and chosen(["lolcats", TEACHER]) == ["lolcats"]
    with pytest.raises(LinearizeError, match="did you mean 'lolcats'"):
        chosen(["lolcat"])
    with pytest.raises(LinearizeError, match="did you mean 'llama-3-8b'"):
        random_model("meta", torch.float32, "llama3-8b")
    assert all(check(mixers_of(name)[0]) == [] for name in VARIANTS)
    sizes = {name: random_model("meta", torch.bfloat16, name).num_parameters() / 1e9 for name in SHAPES}
    assert {name: round(size, 2) for name, size in sizes.items()} == {
        "smollm2-135m": 0.13, "smollm2-360m": 0.36, "llama-3.2-1b": 1.24, "llama-3-8b": 8.03, "tiny": 0.0,
    }  # fmt: skip
    made = random_model("cpu", torch.bfloat16, "tiny")
    assert convert(made, TEACHER) is made


def test_a_model_that_is_warmed_has_every_mixer():
    found = {name: layers_of_each(name) for name in ("lolcats", "xatl", "based_alternating", "halo", TEACHER)}
    assert found == {"lolcats": 2, "xatl": 2, "based_alternating": 2, "halo": 4, TEACHER: 2}


def test_with_only_there_is_no_teacher_and_what_is_compiled_before_runs_in_few_layers(monkeypatch, tmp_path):
    layers, own = [], recipes.build
    monkeypatch.setattr(
        recipes, "build", lambda *given, **changes: layers.append(changes) or own(*given, **changes)
    )
    rows = bench(tmp_path, "--only", "--recipes", "lolcats", "--batch", "1", "--profile")
    assert [(row["recipe"], row["note"]) for row in rows] == [("lolcats", "")]
    assert layers == [{"num_hidden_layers": 2}, {}]
    assert len(json.loads((tmp_path / "recipes-profile.json").read_text())) == 1


@pytest.mark.parametrize("name", [TEACHER, "halo"])
def test_compiled_blocks_are_those_of_few_layers(name, monkeypatch, tmp_path):
    """Each kind of block is compiled once for its size, in few layers, and then for no layer more; the loss stays."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(blocks, "keeping_little", backend)
    given = ("tiny", (2,), (24,), "bf16", torch.device("cpu"))
    ahead = recipes.compiled_ahead(name, *given, compiled=True)
    kinds = len(made)
    assert kinds == (1 if name == TEACHER else 2) and ahead.obstacle is None
    model = recipes.build(name, "tiny", "bf16", torch.device("cpu"), num_hidden_layers=8)
    step = recipes.Step(model, torch.device("cpu"), "bf16", compiled=True, like=ahead)
    loss = step.call(2, 24)()
    assert len(made) == kinds and len(step.blocks.layers) == 8
    torch.testing.assert_close(recipes.Step(model, torch.device("cpu"), "bf16").call(2, 24)(), loss)


def test_what_is_not_compiled_is_said(monkeypatch, tmp_path):
    def fails(graph, inputs):
        raise torch._dynamo.exc.TorchDynamoException("no such thing")

    monkeypatch.setattr(blocks, "keeping_little", fails)
    rows = bench(tmp_path, "--only", "--recipes", "lolcats", "--batch", "1", "--compile")
    assert rows[0]["way"] == "bf16, compiled" and "blocks are not compiled: " in rows[0]["note"]


def test_nobody_runs_the_whole_model_out_of_turn(monkeypatch, tmp_path):
    held = []

    def measured(self, batch, length):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "turn.lock", timeout=0).acquire()
        held.append(batch)
        return {**whole.empty(""), "tokens_per_second": 1.0, "milliseconds": 1.0}

    monkeypatch.setattr(recipes.Step, "measured", measured)
    bench(tmp_path, "--only", "--recipes", "lolcats", "--batch", "1,2")
    assert held == [1, 2]
    FileLock(tmp_path / "turn.lock", timeout=0).acquire()


def test_a_graph_needs_a_gpu(tmp_path, capsys):
    assert cli.main(["bench", "recipes", *TINY, "--captured", "--out", str(tmp_path)]) == 2
    assert "--captured records CUDA graphs" in capsys.readouterr().err


def test_a_step_that_cannot_be_recorded_is_measured_without(monkeypatch, tmp_path):
    """And its row says so: it has the way of steps that are not recorded, and the reason."""

    def forgo(self, run, batch, count, kind=None):
        self.obstacle = "something looks at the host"
        return run(batch, count)

    monkeypatch.setattr(captured.Captured, "__call__", forgo)
    device = torch.device("cpu")
    options = argparse.Namespace(
        length=(8,), batch=(1, 2), largest=False, shape="tiny", precision="bf16", only=False, captured=True,
        compile=False,
        profile=False, out=tmp_path,
    )  # fmt: skip
    for row in recipes.rows("lolcats", options, device, whole.Budget(None)):
        assert row["tokens_per_second"] > 0 and row["way"] == "bf16"
        assert row["note"] == "not recorded: something looks at the host"


def test_a_recording_that_raises_is_measured_without(monkeypatch):
    """Whatever it raises but for want of memory, of which the row says nothing else."""

    def fails(self, run, batch, count, kind=None):
        run(batch, count)
        raise raised("no such thing")

    monkeypatch.setattr(captured.Captured, "__call__", fails)
    device = torch.device("cpu")
    step = recipes.Step(recipes.build("lolcats", "tiny", "bf16", device), device, "bf16", captured=True)
    for raised in (AssertionError, RuntimeError):
        row = step.measured(1, 16)
        assert row["tokens_per_second"] > 0 and row["way"] == "bf16"
        assert row["note"] == f"not recorded: {raised.__name__}: no such thing"
        assert step.captured, "the next size is recorded if it can be"
    for raised, text in ((torch.OutOfMemoryError, "no such thing"), (RuntimeError, "illegal memory access")):
        monkeypatch.setattr(
            captured.Captured, "__call__", lambda *_, raised=raised, text=text: _raise(raised(text))
        )
        with pytest.raises(raised, match=text):
            step.measured(1, 16)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("name", "precision"), [(TEACHER, "bf16"), ("lolcats", "autocast"), ("gla", "bf16"), ("halo", "bf16")]
)
def test_a_recorded_step_reads_nothing_back(name, precision, monkeypatch):
    """And makes no mask while it is recorded, as transformers does by itself: reading one copies it to the host."""
    replayed.on_cpu(monkeypatch)
    device = torch.device("cpu")
    model = recipes.build(name, "tiny", precision, device)
    recorded = recipes.Step(model, device, precision, captured=True)
    row = recorded.measured(2, 24)
    loss = recorded.call(2, 24)()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(recipes.Step(model, device, precision).call(2, 24)(), loss)
    assert row["loss"] == pytest.approx(float(loss), abs=1e-3) and gradients
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, gradients, rtol=5e-2, atol=1e-3)


QUICK = ("arwkv", "best_constant", "halo", "lolcats", "mesanet", "sse", TEACHER)
"""Of all that are asked in minutes, some of each kind."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in (TEACHER, *subjects())],
)
def test_a_step_on_kernels_waits_for_nothing(name, monkeypatch):
    """A whole step on the meta device, with what the kernels say of their shapes: data that are read, or come from the
    host, raise there. Every parameter gets a gradient, so that what is recorded has met them all."""
    no_autocast(monkeypatch)
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and asked(kind))
    monkeypatch.setenv("LINEARIZE_COMPILE", "never")
    monkeypatch.setattr(dispatch, "use_triton", lambda *_: True)
    monkeypatch.setattr(
        headless, "recognize", lambda model, device: Head(model.lm_head.weight, None, 1.0, None)
    )
    sizes = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": layers_of_each(name)}
    step = recipes.Step(recipes.build(name, "tiny", "bf16", META, **sizes), META, "bf16")
    call = step.call(2, 96)
    with OnDevice() as mode:
        call()
    assert "linearize" in mode.seen
    assert all(p.grad is not None for p in step.model.parameters())


def test_warming_measures_nothing(tmp_path, capsys):
    arguments = ["bench", "recipes", *TINY, "--warm", "--recipes", "lolcats,softmax", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "lolcats\n" in said and "softmax\n" in said and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_what_is_needed(capsys):
    assert cli.main(["bench", "recipes"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
