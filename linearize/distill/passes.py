"""How micro-steps of a stage run: the first part by part, the others compiled and from a recording where that pays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import masking_utils

from linearize import surgery
from linearize.config.schema import RunConfig, StageConfig
from linearize.distill import shards
from linearize.distill.blocks import Blocks, Place
from linearize.distill.captured import Captured
from linearize.distill.window_dropout import Draw, Off
from linearize.mixers.compiled import part_by_part
from linearize.patch import changed

log = logging.getLogger(__name__)

COMPILE_FROM = 200
"""Optimizer steps of a stage whose blocks are compiled, which takes up to a minute."""
MASK = 2**28
"""Numbers of the largest mask [B, 1, T, T] that is made for the sake of a recording.

Softmax reads a mask in every layer, and has no flash kernel with one. Where texts are so long, kernels take longer than
their launches, so that there is nothing to win.
"""

NONE = Draw()
"""No window is ever off."""
DrawnStep = Callable[[dict[str, Tensor], Tensor | None, Sequence[Off]], Tensor]
"""A `captured.MicroStep` that is told which windows are off."""


class Passes:
    """Runs the micro-steps of one stage.

    Args:
        model: that trains.
        name: of the stage.
        stage, run: its settings.
        device: where it trains.
        steps: optimizer steps of the stage.
        parameters: everything that trains.
        compiled: gives what may be compiled, see `blocks`.
        spread: whether other processes hold the rest of each sequence.

    Attributes:
        captured: the recording.
        blocks: the compiled blocks; None before the second micro-step.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        stage: StageConfig,
        run: RunConfig,
        device: torch.device,
        steps: int,
        parameters: list[nn.Parameter],
        compiled: Callable[[], Sequence[nn.Module | Place]],
        spread: bool = False,
    ) -> None:
        self.model, self.name, self.parts = model, name, compiled
        self.captured = Captured(parameters, name, _obstacle(run, device))
        many = device.type == "cuda" and steps >= COMPILE_FROM
        self.compiles = run.compile == "always" or (run.compile == "auto" and many)
        # blocks are whole for as long as they compute, and never twice in the same place; processes wait for each other
        if shards.in_shards(model):
            self.captured.obstacle, self.compiles = "its weights are sharded", False
            log.info("stage '%s' runs without a CUDA graph and uncompiled: its weights are sharded", name)
        elif spread:
            self.captured.obstacle = "its sequences are spread over processes"
            log.info("stage '%s' runs without a CUDA graph: %s", name, self.captured.obstacle)
        self.blocks: Blocks | None = None
        # sequences that are spread have no padding, and their softmax no mask: nothing is to be seen in a first pass,
        # which would take more memory than the others
        self._looked_at = spread

    def looks(self, batch: dict[str, Tensor]) -> bool:
        """Whether a pass over it now runs part by part, and takes more memory than the compiled ones behind it."""
        return self.compiles and not self._looked_at and "attention_mask" not in batch

    def __call__(
        self,
        step: DrawnStep,
        part: dict[str, Tensor],
        count: Tensor | None,
        draw: Draw = NONE,
        kind: Hashable = None,
    ) -> Tensor:
        """One micro-step.

        Args:
            step: forward and backward.
            part: tensors of some sequences, on the device.
            count: see `StageTrainer.micro_step`.
            draw: which windows are off. Where layers are drawn, a recorded or compiled step is told on the device.
            kind: what else `step` reads on the host that may change over the stage.
        """
        if "attention_mask" in part or not self._looked_at:
            with part_by_part() if self.compiles else nullcontext():
                losses = step(part, count, draw.off)
            # later batches are packed in the same way, and have no padding
            self._looked_at |= "attention_mask" not in part
            return losses
        batch, tokens = part["input_ids"].shape
        looks = batch * tokens**2 > MASK
        if looks and self.captured.obstacle is None:
            self.captured.forgo(
                f"masks of {batch} x {tokens:,} x {tokens:,} are made only where they are needed"
            )

        known = draw.sure or not (self.captured.obstacle is None or self.compiles)

        def run(batch: dict[str, Tensor], count: Tensor | None) -> Tensor:
            rest, off = (batch, draw.off) if known else draw.taken_from(batch)
            # entered here: what is replayed has no use for it, and a look through a model keeps the device waiting
            with self._trusting(looks):
                return step(rest, count, off)

        if known:
            return self.captured(run, part, count, (any(draw.off), kind))
        return self.captured(run, draw.put_into(part), count, (None, kind))

    @contextmanager
    def _trusting(self, looks: bool) -> Iterator[None]:
        """Around micro-steps like one that has been looked at: nothing in them waits for the device."""
        if self.blocks is None:
            self.blocks = Blocks(self.parts() if self.compiles else [], self.name)
        with ExitStack() as stack:
            told = not looks and (self.captured.obstacle is None or self.compiles)
            stack.enter_context(waiting_for_nothing(self.model, looks=not told))
            stack.enter_context(self.blocks.compiled())
            yield


@contextmanager
def waiting_for_nothing(model: nn.Module, *, looks: bool = False) -> Iterator[None]:
    """Around passes that may be recorded or compiled: over texts without padding, whose masks are taken at their word.

    Args:
        model: that runs, converted or not.
        looks: masks are made only where documents are packed, which waits for the device.
    """
    with ExitStack() as stack:
        if surgery.converted(model):
            stack.enter_context(surgery.trusting(model))
        if not looks:
            # as while it records or compiles: masks are made without a look at where documents begin
            stack.enter_context(changed(masking_utils, "is_tracing", lambda *_: True))
        yield


def _obstacle(run: RunConfig, device: torch.device) -> str | None:
    """Why a stage's micro-steps are not recorded, or None."""
    return "not asked for" if device.type != "cuda" or not run.capture else None
