"""Where the weights of a run are: whole in every process, or sharded over all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from linearize import launched, models
from linearize.config.schema import Recipe
from linearize.distill import processes, shards
from linearize.distill.lent import lend
from linearize.errors import LinearizeError
from linearize.models import routers

log = logging.getLogger(__name__)

Made = TypeVar("Made")


class Place:
    """Loads models where they belong, and knows who computes with them.

    Args:
        source: the teacher.
        recipe: its `run.shard` decides.
        device: of this process.
        weights: dtype of what does not train.
        passes: dtype of autocast, or None.

    Attributes:
        sharded: whether base weights are.
    """

    def __init__(
        self,
        source: str,
        recipe: Recipe,
        device: torch.device,
        weights: torch.dtype,
        passes: torch.dtype | None,
    ) -> None:
        self.source, self.recipe, self.device = source, recipe, device
        self.weights, self.passes = weights, passes
        self.sharded = processes.several() and processes.alone(self._wanted)
        if recipe.run.shard == "full" and not processes.several():
            log.info("run.shard: one process has nobody to share weights with, and keeps them whole")
        if recipe.run.sequence > 1 and not processes.several():
            log.info("run.sequence: one process has nobody to share sequences with, and keeps them whole")

    def _wanted(self) -> bool:
        if self.recipe.run.shard != "auto" or self.device.type != "cuda":
            return self.recipe.run.shard == "full"
        from linearize.cost import stages
        from linearize.cost.cards import Card

        properties = torch.cuda.get_device_properties(self.device)
        card = Card(properties.name, float(properties.total_memory), 0.0, 1.0)
        try:
            ways = stages.ways(models.load_config(self.source), self.recipe, launched.count(), card)
        except LinearizeError as error:
            log.info("run.shard: auto keeps weights whole where the plan has no formulas (%s)", error)
            return False
        narrow = [name for name, way in ways.items() if way not in ("one card", "ddp")]
        if narrow:
            log.info("weights are sharded: a copy for each process does not fit in %s", ", ".join(narrow))
        return bool(narrow)

    def load(self) -> tuple[Any, Any]:
        """The teacher and its tokenizer: on the device, or where they are to be sharded, in the machine's memory."""
        return self._load(self.source, kept=False)

    def _load(self, source: str, *, kept: bool) -> tuple[Any, Any]:
        home = "cpu" if self.sharded or kept else str(self.device)
        model, tokenizer = models.load_teacher(source, dtype=self.weights, device=home, for_text=True)
        routers.widen(model)
        return model, tokenizer

    def settle(self, model: Any) -> None:
        """Shard a converted model, if that is what happens here."""
        if self.sharded:
            shards.widen(model, self.recipe)
            trains = any("all" in stage.train for stage in self.recipe.stages.values())
            shards.into_shards(model, self.device, self.passes if trains else None)

    def original(self) -> nn.Module:
        """A frozen teacher of its own: another model, or a copy of the one that has changed since."""
        lent = self.recipe.run.teacher_device == "cpu"
        model, _ = self._load(self.recipe.run.teacher or self.source, kept=lent)
        model.requires_grad_(False).eval()
        if self.sharded:
            shards.into_shards(model, self.device)
        elif lent:
            lend(model, self.device)
        frozen: nn.Module = model
        return frozen

    def by_holders(self, job: Callable[[], Made], computes: bool = True) -> Made:
        """Do what needs the model: by the first process for all, or by all together where each has a part.

        Args:
            job: to be done.
            computes: whether it is passes and nothing but passes, which end where a process is gone.
        """
        if not self.sharded:
            return processes.alone(job)
        with processes.in_pass() if computes else nullcontext():
            return job()
