"""AdamW with its groups, and the learning rate over a stage's steps."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearize.config.schema import StageConfig


def build_optimizer(
    parameters: dict[str, nn.Parameter], stage: StageConfig, *, fused: bool, mixers: Collection[int] = ()
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices only.

    Args:
        parameters: everything that trains.
        stage: its rates; groups of `lr_mixers` stand last.
        fused: one kernel for all parameters.
        mixers: ids of the parameters that `lr_mixers`, if there is one, is for.
    """
    rest, apart = list(parameters.values()), []
    if stage.lr_mixers is not None:
        rest = [parameter for parameter in parameters.values() if id(parameter) not in mixers]
        apart = [parameter for parameter in parameters.values() if id(parameter) in mixers]
    groups = []
    for own, lr in ((rest, stage.lr), (apart, stage.lr_mixers)):
        matrices = [parameter for parameter in own if parameter.ndim >= 2]
        vectors = [parameter for parameter in own if parameter.ndim < 2]
        groups += [
            {"params": matrices, "weight_decay": stage.weight_decay, "lr": lr},
            {"params": vectors, "weight_decay": 0.0, "lr": lr},
        ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.lr, fused=fused)


def build_scheduler(optimizer: torch.optim.Optimizer, stage: StageConfig, steps: int) -> Any:
    """Linear warm-up to `lr`, then a cosine down to `min_lr_ratio` x `lr` at the last step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, Schedule(stage.warmup_ratio, stage.min_lr_ratio, steps)
    )


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a share of the peak, by step (0 is the first)."""

    warmup_ratio: float
    min_lr_ratio: float
    steps: int

    def __call__(self, step: int) -> float:
        warmup = math.ceil(self.warmup_ratio * self.steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, self.steps - 1 - warmup))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
