"""A recorded micro-step gives what the same step gives one operation after the other."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from linearize.bench.steps import RandomText
from linearize.bench.subjects import convert, random_model, subjects
from linearize.config.schema import LoraConfig, RunConfig, StageConfig
from linearize.distill import stages
from linearize.distill.captured import WARM_UP, Captured
from linearize.recording import record
from linearize.surgery import converted

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 2}
LENGTH = 96
STAGES = {
    "transfer": {"objective": {"attention_output": 10.0}, "train": ["mixers"], "lr": 1e-2},
    "all_kl": {"objective": {"next_token": 0.5, "logits_kl": 1.0}, "train": ["all"], "lr": 1e-3},
    "lora": {"objective": {"next_token": 1.0}, "train": ["lora", "mixers"], "lora": LoraConfig(rank=4, dropout=0.1)},
}  # fmt: skip


def trained(folder: Path, recipe: str, stage: str, steps: int, *, capture: bool, resume_at: int = 0, **more):
    """Losses of every step, the trained parameters, and the trainer's `Captured`."""
    torch.manual_seed(0)
    model = convert(random_model("cuda", torch.float32, "tiny", **SIZES), recipe)
    setting = StageConfig(
        **{**STAGES[stage], **more}, tokens=steps * 4 * LENGTH, batch_size=4, micro_batch=2, log_every=1,
        save_every=resume_at or 10_000,
    )  # fmt: skip
    run = RunConfig(device="cuda", capture=capture)

    def teacher() -> nn.Module:
        return random_model("cuda", torch.float32, "tiny", **SIZES).requires_grad_(False)

    losses: list[float] = []
    opened = stages.training(
        model, setting, name=stage, folder=folder, run=run, seed=1, dataset=RandomText(97, LENGTH, count=64),
        length=LENGTH, autocast=torch.bfloat16, teacher=teacher if stage == "all_kl" else None,
    )  # fmt: skip
    with opened as trainer:
        trainer.add_callback(Losses(trainer, losses))
        start = folder / f"checkpoint-{resume_at}"
        trainer.train(resume_from_checkpoint=str(start) if start.is_dir() else None)
        found = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        return losses, found, trainer.passes.captured


def Losses(trainer, losses):
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            losses.append(trainer.take_window()["loss"])

    return Keep()


def same(one, other, rtol: float = 2e-2) -> None:
    losses, weights = one[:2]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(other[0]), rtol=rtol, atol=1e-4)
    for name, x in weights.items():
        torch.testing.assert_close(
            x, other[1][name], rtol=rtol, atol=5e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("recipe", subjects())
def test_of_every_recipe(recipe, tmp_path, monkeypatch):
    """A few steps with accumulation and clipping of each stage."""
    monkeypatch.setenv("LINEARIZE_COMPILE", "never")
    model = convert(random_model("meta", torch.float32, "tiny", **SIZES), recipe)
    trains = any(layer.mixer.added_parameters for layer in converted(model))
    for stage in ("transfer", "all_kl") if trains else ("all_kl",):
        with ExitStack():
            eager = trained(tmp_path / f"{stage}-eager", recipe, stage, 8, capture=False)
            recorded = trained(tmp_path / stage, recipe, stage, 8, capture=True)
        assert recorded[2].graph is not None, recorded[2].obstacle
        same(eager, recorded)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_over_fifty_steps(stage, checkpointing, tmp_path):
    """With dropout, gradient checkpointing, compiled mixers, and a run that stops and goes on in the middle."""
    if stage == "transfer" and checkpointing:
        pytest.skip("no graph spans layers there")
    more = {"gradient_checkpointing": checkpointing}
    eager = trained(tmp_path / "eager", "lolcats", stage, 50, capture=False, **more)
    recorded = trained(tmp_path / "recorded", "lolcats", stage, 50, capture=True, resume_at=30, **more)
    same(eager, recorded)
    again = trained(tmp_path / "recorded", "lolcats", stage, 50, capture=True, resume_at=30, **more)
    assert len(again[0]) == 20
    same((recorded[0][30:], recorded[1]), again)


@pytest.mark.gpu
@CUDA
def test_what_cannot_be_recorded_goes_on(caplog):
    """A look at the device inside; the step that was to be recorded counts once."""
    weight = nn.Parameter(torch.ones(3, device="cuda"))

    def run(batch, count):
        loss = (weight * batch["x"]).sum()
        assert loss.item() < 1e9
        loss.backward()
        return loss.detach()[None]

    captured = Captured([weight], "probe")
    x = torch.arange(3.0, device="cuda")
    with caplog.at_level(logging.INFO):
        losses = [float(captured(run, {"x": x}, None)) for _ in range(WARM_UP + 2)]
    assert losses == [3.0] * (WARM_UP + 2)
    assert torch.equal(weight.grad, (WARM_UP + 2) * x)
    assert captured.graph is None and "without a CUDA graph" in caplog.text
    # nothing is left of the recording that failed
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    first = torch.randn(3, device="cuda")
    assert not torch.equal(first, torch.randn(3, device="cuda"))
    x = torch.zeros(3, device="cuda")
    graph, made = record(lambda: x + 1)
    graph.replay()
    assert made.tolist() == [1.0] * 3


@pytest.mark.gpu
@CUDA
def test_gradients_add_up_across_recorded_and_other_batches():
    weight, idle = (nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2))

    def run(batch, count):
        loss = (weight * batch["x"]).sum() / count
        loss.backward()
        return loss.detach()[None]

    captured = Captured([weight, idle], "probe")
    count = torch.tensor(2.0, device="cuda")
    for turn in range(WARM_UP + 4):
        x = torch.full((3,), float(turn), device="cuda")
        captured(run, {"x": x}, count)
        captured(run, {"x": x + 1}, count)
        wide = torch.ones(1, 3, device="cuda")
        if turn > WARM_UP:  # another shape, one by one, into the same gradients
            captured(run, {"x": wide}, count)
        expected = (2 * turn + 1 + (turn > WARM_UP)) / 2
        torch.testing.assert_close(weight.grad, torch.full((3,), expected, device="cuda"))
        assert idle.grad is None
        weight.grad = None
    assert captured.graph is not None


def test_without_a_gpu_a_step_is_what_it_was():
    seen = []
    captured = Captured([], "probe", obstacle="not asked for")
    captured(lambda batch, count: seen.append((batch, count)) or torch.ones(1), {"x": 1}, None)
    assert seen == [({"x": 1}, None)] and captured.graph is None
