"""Stages of a few small steps on random text, for tests that compare two ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from linearize import surgery
from linearize.bench.subjects import convert, random_model
from linearize.config.schema import LoraConfig, RunConfig, StageConfig
from linearize.distill import stages
from linearize.distill.rates import RandomText

SIZES = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 2}
LENGTH = 96
DOCUMENT = 80
"""Tokens: more than a window of the recipes, or a branch behind it would have nothing to learn."""
STAGES = {
    # outputs of random weights are small: losses of about one, and gradients that are clipped
    "transfer": {"objective": {"attention_output": 1e4}, "train": ["mixers"], "lr": 1e-2},
    "weights": {"objective": {"attention_weights": 1.0}, "train": ["mixers"], "lr": 1e-2},
    "matrix": {"objective": {"mixing_matrix": 1.0}, "train": ["mixers"], "lr": 1e-2},
    "all_kl": {"objective": {"next_token": 0.5, "logits_kl": 1.0}, "train": ["all"], "lr": 1e-3},
    "lora": {"objective": {"next_token": 1.0}, "train": ["lora", "mixers"], "lora": LoraConfig(rank=4, dropout=0.1)},
}  # fmt: skip


def trained(
    folder: Path,
    recipe: Any,
    stage: str,
    steps: int,
    *,
    capture: bool,
    resume_at: int = 0,
    device: str = "cuda",
    watches: Callable[[Any], None] = lambda trainer: None,
    **more,
):
    """Losses of every step, the trained parameters, and the trainer's `Captured`; in float32 on the CPU."""
    torch.manual_seed(0)
    model = random_model(device, torch.float32, "tiny", **SIZES)
    model = convert(model, recipe) if isinstance(recipe, str) else surgery.convert(model, recipe, "all")
    setting = StageConfig(
        **{"batch_size": 4, "micro_batch": 2, "tokens": steps * 4 * LENGTH, **STAGES[stage], **more}, log_every=1,
        save_every=resume_at or 10_000,
    )  # fmt: skip
    run = RunConfig(device=device, capture=capture)

    def teacher() -> nn.Module:
        return random_model(device, torch.float32, "tiny", **SIZES).requires_grad_(False)

    losses: list[float] = []
    autocast = torch.bfloat16 if device == "cuda" else None
    opened = stages.training(
        model, setting, name=stage, folder=folder, run=run, seed=1, dataset=RandomText(97, LENGTH, 64, DOCUMENT),
        length=LENGTH, autocast=autocast, teacher=teacher if stage == "all_kl" else None,
    )  # fmt: skip
    with opened as trainer:
        trainer.add_callback(Losses(trainer, losses))
        watches(trainer)
        start = folder / f"checkpoint-{resume_at}"
        trainer.train(resume_from_checkpoint=str(start) if start.is_dir() else None)
        found = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        return losses, found, trainer.passes.captured


class Losses(TrainerCallback):
    def __init__(self, trainer, losses: list[float]) -> None:
        self.trainer, self.losses = trainer, losses

    def on_step_end(self, args, state, control, **_):
        self.losses.append(self.trainer.take_window()["loss"])


def same(one, other, rtol: float = 2e-2, atol: float = 5e-3) -> None:
    """Of two that `trained` gave: losses, and what has been trained."""
    losses, weights = one[:2]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(other[0]), rtol=rtol, atol=min(1e-4, atol))
    for name, x in weights.items():
        torch.testing.assert_close(
            x, other[1][name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


TREMBLE = 1e-4
"""Of a gradient's largest number: far less than bfloat16 leaves apart, and more than what an order of sums does."""


def trembling(trainer: Any) -> None:
    """For `watches`: noise on every gradient, drawn alike wherever it is asked for."""
    generators: dict[torch.device, torch.Generator] = {}

    def noisy(x: torch.Tensor) -> torch.Tensor:
        drawn = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(5))
        return x + TREMBLE * x.abs().max() * torch.randn(
            x.shape, generator=drawn, device=x.device, dtype=x.dtype
        )

    for parameter in trainer.parameters.values():
        parameter.register_hook(noisy)


def alike(one, other, begun: dict[str, torch.Tensor], disturbed: Callable[[], Any] | None = None) -> None:
    """Of two that `trained` gave, over many steps: losses, and how far from `begun` each tensor has come, and where to.

    AdamW moves a number whose gradient is rounding alone as far as any other, so that tensors are compared whole. And
    some stages take any noise far (angles that add up over a text, at rates of 1e-2): where tensors are further apart
    than a tenth of their way, `disturbed`, the run of `one` with `trembling` gradients, says whether noise does that.
    What it cannot tell from noise is heard step by step (`beside.each_replay`).
    """
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), rtol=2e-2, atol=1e-5)
    beyond: dict[str, tuple[float, float]] = {}
    for name, start in begun.items():
        moved, apart = (one[1][name] - start).norm(), (one[1][name] - other[1][name]).norm()
        if apart > 0.1 * moved + 1e-6:
            beyond[name] = float(moved), float(apart)
    if beyond and disturbed is not None:
        noisy = disturbed()[1]
        beyond = {name: x for name, x in beyond.items() if x[1] > float((one[1][name] - noisy[name]).norm())}
    assert not beyond, beyond
