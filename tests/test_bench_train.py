"""The benchmark of training steps without a GPU: the trainer's own steps on a tiny model, what they cost, its files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from linearize import cli
from linearize.bench import flops, steps, train, whole
from linearize.bench.subjects import TEACHER, convert, random_model
from linearize.bench.train import STAGES
from linearize.distill.stage import StageTrainer

TINY = ["--device", "cpu", "--shapes", "tiny", "--seconds", "0", "--recipes", "lolcats"]


def bench(out: Path, *arguments: str) -> list[dict]:
    assert cli.main(["bench", "train", *TINY, "--out", str(out), *arguments]) == 0
    return json.loads((out / "train.json").read_text())


@pytest.mark.slow
def test_every_stage_beside_the_softmax_model(tmp_path, capsys):
    rows = bench(tmp_path, "--stages", ",".join(STAGES), "--peak", "0.1", "--profile")
    assert [(row["recipe"], row["stage"]) for row in rows] == [
        (TEACHER, "all"), *(("lolcats", stage) for stage in STAGES)
    ]  # fmt: skip
    for row in rows:
        assert {
            "shape": "tiny",
            "batch": 2,
            "length": 32,
            "note": "",
            "peak_gib": None,
        }.items() <= row.items()
        assert row["steps"] >= steps.LEAST and 0 < row["busy"] <= 1 and row["kernels"] > 100
        assert row["tokens_per_second"] == pytest.approx(64e3 / row["milliseconds"], rel=1e-2)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["mflops_per_token"] / 1e5, abs=1e-4)
        assert row["ratio"] == pytest.approx(
            row["tokens_per_second"] / rows[0]["tokens_per_second"], abs=1e-3
        )
    lora = rows[1 + list(STAGES).index("lora")]
    assert rows[1]["loss"] > 0 and lora["loss"] == pytest.approx(torch.tensor(97.0).log().item(), rel=0.1)
    again = bench(tmp_path, "--stages", "transfer", "--kernels", "torch", "--checkpointing")
    assert (
        again[: len(rows)][2:] == rows[2:]
        and again[-1]["way"] == "float32 weights, plain torch, checkpointing"
    )
    page = (tmp_path / "train.md").read_text()
    assert "## tiny, float32 weights, kernels" in page and "| lolcats | all_kl |" in page
    assert "x softmax" in capsys.readouterr().out


def test_what_is_timed_is_the_trainers_own_step(tmp_path, monkeypatch):
    seen = []
    own = StageTrainer.training_step
    monkeypatch.setattr(StageTrainer, "training_step", lambda self, *a: seen.append(self) or own(self, *a))
    bench(tmp_path, "--stages", "lora", "--batch", "3", "--length", "8")
    assert len(seen) == 2 * (steps.WARM + steps.LEAST)
    assert {trainer.stage.batch_size for trainer in seen} == {3}


def test_windows_that_are_off_and_steps_without_a_graph(tmp_path, monkeypatch):
    seen = []
    own = StageTrainer.training_step
    monkeypatch.setattr(StageTrainer, "training_step", lambda self, *a: seen.append(self) or own(self, *a))
    [row] = bench(tmp_path, "--stages", "transfer", "--window-dropout", "0.5", "--no-capture", "--only")
    assert {trainer.stage.window_dropout for trainer in seen} == {0.5}
    assert row["way"] == "float32 weights, kernels, no graph, windows off at 0.5" and row["ratio"] is None
    assert row["recipe"] == "lolcats" and row["tokens_per_second"] > 0


def test_what_fails_is_a_row_and_nothing_is_begun_behind_the_budget(tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(train, "loaded", no_memory)
    rows = bench(tmp_path / "a", "--stages", "lora")
    assert [(row["note"], row["mfu"], row["ratio"]) for row in rows] == [("out of memory", None, None)] * 2
    monkeypatch.setattr(train.time, "monotonic", iter([0.0, 0.0, *[9e9] * 9]).__next__)
    rows = bench(tmp_path / "b", "--stages", "lora", "--budget", "1")
    assert [row["note"] for row in rows] == ["not run: the budget is spent"] * 2
    assert "out of memory" in (tmp_path / "a" / "train.md").read_text()


def test_what_a_first_step_compiles_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(whole.time, "monotonic", lambda: now[0])
    budget, endless = whole.Budget(10.0), whole.Budget(None)
    now[0] = 100.0
    assert budget.spent and not endless.spent
    for row in ({"first_seconds": 95.0}, {"first_seconds": None}, {}):
        budget.leave_out(row)
        endless.leave_out(row)
    assert not budget.spent and not endless.spent
    now[0] = 105.5
    assert budget.spent


def test_time_between_kernels():
    """Microseconds; two run at once, one waits for the host, one follows at a graph's distance."""
    spans = [(100.0, 200.0), (150.0, 300.0), (1300.0, 1400.0), (1403.0, 1500.0)]
    events = [
        SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=start, end=end))
        for kind, (start, end) in [(DeviceType.CPU, (0.0, 9000.0)), *((DeviceType.CUDA, x) for x in spans)]
    ]
    recorded = SimpleNamespace(events=lambda: events)
    assert steps._between(recorded) == {"waits": 1.0, "gaps": 0.003}
    assert steps._between(SimpleNamespace(events=list)) == {"waits": 0.0, "gaps": 0.0}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--stages", "lora_lk", "'lora_kl'"),
        ("--shapes", "tinny", "'tiny'"),
        ("--recipes", "lolcat", "'lolcats'"),
    ],
)
def test_a_misspelt_name_is_told(option, value, says, capsys):
    asked = dict(zip(TINY[::2], TINY[1::2], strict=True)) | {option: value}
    assert cli.main(["bench", "train", *(part for pair in asked.items() for part in pair)]) == 2
    assert f"did you mean {says}" in capsys.readouterr().err


@pytest.mark.parametrize("length", [8, 64])
def test_the_formula_is_what_torch_counts_in_the_softmax_model(length):
    """Torch counts all keys of every query, where the formula has the causal half."""
    model = random_model("cpu", torch.float32, "tiny", attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(2, length, dtype=torch.int64), use_cache=False).logits.sum().backward()
    causal = 3 * model.config.num_hidden_layers * flops.softmax_layer(model.config, length)
    found = counter.get_total_flops() / (2 * length)
    assert flops.per_token(model, "all", length) == found - causal * (2 * length / (length + 1) - 1)


def test_passes_of_a_converted_model():
    plain = random_model("cpu", torch.float32, "tiny")
    softmax = flops.per_token(plain, "all", 32)
    body = sum(p.numel() for n, p in plain.named_parameters() if p.dim() > 1 and "embed" not in n)
    model = convert(plain, "lolcats")
    own = sum(p.numel() for n, p in model.named_parameters() if ".mixer." in n)
    attention = 2 * flops.softmax_layer(model.config, 32)
    last = model.model.layers[-1]
    unread = sum(p.numel() for part in (last.mlp, last.self_attn.o_proj) for p in part.parameters())
    assert unread > 0 and flops.per_token(model, "transfer", 32) == 2 * (body - unread) + 6 * own + attention
    assert flops.per_token(model, "all", 32) == softmax + 6 * own - 3 * attention
    assert flops.per_token(model, "all_kl", 32) == pytest.approx(8 * (body + 97 * 32) + 6 * own + attention)
    assert flops.peak(torch.device("cpu")) is None and flops.peak(torch.device("cpu"), 2.0) == 2e12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_what_is_needed(capsys):
    assert cli.main(["bench", "train"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_model_that_no_batch_makes_fit_is_not_tried():
    shape, gib = "llama-3-8b", 2**30
    assert "weights, gradients and AdamW take 135 GiB, the device has 80" in train.too_large(
        "all", shape, 80 * gib
    )
    assert train.too_large("all_kl", shape, 160 * gib) is None
    assert train.too_large("lora_kl", shape, gib) is None
