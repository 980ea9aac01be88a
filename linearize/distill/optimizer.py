"""AdamW with its groups, and the learning rate over a stage's steps."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearize.config.course import Course
from linearize.config.schedule import Over
from linearize.config.schema import StageConfig
from linearize.distill.shards import is_sharded


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
        for parts in (False, True):  # torch steps through sharded parameters and others apart
            alike = [parameter for parameter in own if is_sharded(parameter) == parts]
            matrices = [parameter for parameter in alike if parameter.ndim >= 2]
            vectors = [parameter for parameter in alike if parameter.ndim < 2]
            groups += [
                {"params": matrices, "weight_decay": stage.weight_decay, "lr": lr, "apart": own is apart},
                {"params": vectors, "weight_decay": 0.0, "lr": lr, "apart": own is apart},
            ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.lr, fused=fused)


def build_scheduler(optimizer: torch.optim.Optimizer, stage: StageConfig, course: Course) -> Any:
    """Linear warm-up to `lr`, then the stage's `lr_schedule`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, Rate(stage, course))


@dataclass(frozen=True)
class Rate:
    """Learning rate as a share of the peak, by step (0 is the first).

    cosine: Loshchilov & Hutter 2017 (arXiv 1608.03983), down to `min_lr_ratio` at the last step; wsd (warm-up, stable,
    decay): Hu et al. 2024 (arXiv 2404.06395), with a linear decay as Hagele et al. 2024 (arXiv 2405.18392).
    """

    stage: StageConfig
    course: Course

    def __call__(self, step: int) -> float:
        stage, last = self.stage, self.course.steps - 1
        warmup = math.ceil(stage.warmup_ratio * self.course.steps)
        rising = min(1.0, (step + 1) / (warmup + 1))
        if not isinstance(stage.lr_schedule, str):
            return rising * self.course.value(Over.of(stage.lr_schedule), step)
        if step < warmup or stage.lr_schedule == "constant":
            return rising
        if stage.lr_schedule == "wsd":
            falling = max(1, math.ceil(stage.decay_ratio * self.course.steps))
            progress = min(1.0, max(0, step - (last - falling)) / falling)
            return 1 - (1 - stage.min_lr_ratio) * progress
        progress = min(1.0, (step - warmup) / max(1, last - warmup))
        return stage.min_lr_ratio + (1 - stage.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
