"""The parts of a stage: budget, schedule, order of the data, accumulation, precision, and the meter."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_llama import MIXER, tiny_llama
from rich.console import Console
from torch import Tensor

from linearize import objectives, progress, surgery
from linearize.config.schema import LoraConfig, RunConfig, StageConfig
from linearize.distill import continuing
from linearize.distill.finetune import FinetuneTrainer
from linearize.distill.optimizer import build_optimizer
from linearize.distill.stage import StageTrainer
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import TransferTrainer


def test_weight_decay_spares_vectors() -> None:
    parameters = {"m": torch.nn.Parameter(torch.ones(2, 2)), "v": torch.nn.Parameter(torch.ones(2))}
    groups = build_optimizer(parameters, StageConfig(weight_decay=0.1), fused=False).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 1)]


def sequences(count: int = 4, length: int = 32) -> list[dict[str, Tensor]]:
    """Packed sequences with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(count):
        ids = torch.randint(0, 256, (length,), generator=generator)
        labels = ids.clone()
        labels[: 5 * index] = -100
        items.append({"input_ids": ids, "position_ids": torch.arange(length), "labels": labels})
    return items


def train_once(
    kind: type[StageTrainer],
    folder: Path,
    *,
    autocast: torch.dtype | None = None,
    objective: dict[str, float] | None = None,
    **changes: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One optimizer step on four sequences; the trained tensors and the step's numbers."""
    torch.manual_seed(0)
    model = surgery.convert(tiny_llama(), MIXER, "all")
    layer = kind is TransferTrainer
    stage = StageConfig(
        objective=objective
        or ({"attention_output": 1.0} if layer else {"next_token": 1.0, "logits_kl": 1.0}),
        train=["mixers"] if layer else ["lora"],
        lora=None if layer else LoraConfig(rank=2),
        tokens=4 * 32,
        **changes,
    )
    model = prepare(model, stage)
    trainer = kind(
        model,
        name="stage",
        stage=stage,
        run=RunConfig(device="cpu"),
        folder=folder,
        dataset=sequences(),
        length=32,
        seed=0,
        device=torch.device("cpu"),
        autocast=autocast,
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in trained(model).items()}, trainer.take_window()


@pytest.mark.parametrize("objective", [*objectives.names("layer"), *objectives.names("model")])
def test_accumulation_equals_one_large_batch(objective: str, tmp_path: Path) -> None:
    """What `--resume` counts on when it takes a smaller batch, and which objectives it has to speak of."""
    kind = TransferTrainer if objective in objectives.names("layer") else FinetuneTrainer
    large, large_numbers = train_once(kind, tmp_path, objective={objective: 1.0}, batch_size=4)
    small, small_numbers = train_once(kind, tmp_path, objective={objective: 1.0}, batch_size=4, micro_batch=1)
    if objective in continuing.OF_EACH_MICRO_BATCH:
        assert small_numbers["loss"] != pytest.approx(large_numbers["loss"], rel=1e-4)
        return
    assert small_numbers["loss"] == pytest.approx(large_numbers["loss"], rel=1e-5)
    assert small_numbers["grad_norm"] == pytest.approx(large_numbers["grad_norm"], rel=1e-4)
    for name, tensor in large.items():
        # Adam's first step is a sign: where a gradient is nearly zero its rounding decides.
        close = torch.isclose(tensor, small[name], rtol=1e-3, atol=1e-5)
        assert close.float().mean() > 0.99, name


@pytest.mark.parametrize("kind", [TransferTrainer, FinetuneTrainer])
def test_bfloat16_keeps_float32_masters(kind: type[StageTrainer], tmp_path: Path) -> None:
    _, exact = train_once(kind, tmp_path, batch_size=4)
    tensors, low = train_once(kind, tmp_path, batch_size=4, autocast=torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert low["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert low["loss"] != exact["loss"]


def test_clipping_bounds_the_step_and_reports_the_norm_before(tmp_path: Path) -> None:
    _, free = train_once(TransferTrainer, tmp_path, batch_size=4, grad_clip=0.0)
    _, clipped = train_once(TransferTrainer, tmp_path, batch_size=4, grad_clip=1e-6)
    assert clipped["grad_norm"] == pytest.approx(free["grad_norm"])


def test_checkpointing_gives_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize.distill import stages

    model = surgery.convert(tiny_llama(), MIXER, "all")
    before = model.forward
    with stages._checkpointing(model, True):
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert model.forward == before


# The meter


def meter_text(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[progress.Meter, Callable[[float], None]], None]
) -> str:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with progress.Meter("job", 1000, console=Console(file=stream, width=200)) as meter:
        use(meter, lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    return stream.getvalue()


def test_meter_writes_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(meter: progress.Meter, wait: Callable[[float], None]) -> None:
        for step in range(25):
            wait(1.0)
            meter.advance(20, loss=1 / (step + 1))

    lines = meter_text(monkeypatch, use).splitlines()
    assert len(lines) == 3  # after 10 and 20 seconds, and at the end
    assert lines[0] == "job  20%  200/1k  loss 0.1  20 tokens/s  ETA 40s"


def test_meter_on_a_terminal_is_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with progress.Meter("job", 100, done=50, console=console) as meter:
        meter.advance(50, loss=0.5)
        meter.note("[not markup]")
    text = stream.getvalue()
    assert "100/100  loss 0.5" in text and "[not markup]" in text


def test_no_number_of_a_bar_is_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with progress.Meter("stage 1/2 transfer, block 12", 20_000_000, console=console) as meter:
        clock[0] = 1000.0
        meter.advance(1_240_000, loss=0.00012345)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1.24M/20M  loss 0.0001234  1.24k tokens/s  ETA 4h12m" in text and "…" not in text
    assert "block 12" in text


def test_meter_does_not_count_an_earlier_run_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "monotonic", iter([0.0, 0.0, 1.0, 1.0]).__next__)
    meter = progress.Meter("job", 1000, done=900, console=Console(file=io.StringIO()))
    meter.__enter__()
    meter.advance(10)
    assert meter.speed == 10


@pytest.mark.parametrize(
    ("number", "text"),
    [(950, "950"), (12_345, "12.3k"), (150_000, "150k"), (4.1e6, "4.1M"), (2e9, "2B"), (None, "?")],
)
def test_count(number: float | None, text: str) -> None:
    assert progress.count(number) == text


@pytest.mark.parametrize(
    ("speed", "text"),
    [(0.0123, "0.012"), (0.35, "0.35"), (4.21, "4.2"), (9.96, "10"), (42.4, "42"), (12_345, "12.3k")],
)
def test_rate(speed: float, text: str) -> None:
    """A job of a few units a minute has a speed."""
    assert progress.rate(speed) == text


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42s"), (200, "3m20s"), (7500, "2h05m")])
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
