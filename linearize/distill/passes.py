"""How micro-steps of a stage run: the first part by part, the others compiled and from a recording where that pays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import masking_utils

from linearize import surgery
from linearize.config.schema import RunConfig, StageConfig
from linearize.distill import shards
from linearize.distill.blocks import Blocks
from linearize.distill.captured import Captured, MicroStep
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
        compiled: Callable[[], list[nn.Module]],
        spread: bool = False,
    ) -> None:
        self.model, self.name, self.parts = model, name, compiled
        self.captured = Captured(parameters, name, _obstacle(run, device))
        many = device.type == "cuda" and steps >= COMPILE_FROM
        self.compiles = run.compile == "always" or (run.compile == "auto" and many)
        # blocks are whole for as long as they compute, and never twice in the same place; processes wait for each other
        sharded, why = shards.in_shards(model), "its sequences are spread over processes"
        if sharded or spread:
            why = "its weights are sharded" if sharded else why
            self.captured.obstacle, self.compiles = why, False
            log.info("stage '%s' runs without a CUDA graph and uncompiled: %s", name, why)
        self.blocks: Blocks | None = None
        self._looked_at = False

    def __call__(
        self,
        step: MicroStep,
        part: dict[str, Tensor],
        count: Tensor | None,
        windows_off: bool | None = False,
    ) -> Tensor:
        """One micro-step.

        Args:
            step: forward and backward.
            part: tensors of some sequences, on the device.
            count: see `StageTrainer.micro_step`.
            windows_off: whether the windows of all layers are off, or None: of some.
        """
        if "attention_mask" in part or not self._looked_at:
            with part_by_part() if self.compiles else nullcontext():
                losses = step(part, count)
            # later batches are packed in the same way, and have no padding
            self._looked_at |= "attention_mask" not in part
            return losses
        batch, tokens = part["input_ids"].shape
        looks = batch * tokens**2 > MASK
        if looks and self.captured.obstacle is None:
            self.captured.forgo(
                f"masks of {batch} x {tokens:,} x {tokens:,} are made only where they are needed"
            )
        with self._trusting(looks):
            if windows_off is None:
                return self.captured.aside(
                    step, part, count, "window_dropout draws other layers for each batch"
                )
            return self.captured(step, part, count, windows_off)

    @contextmanager
    def _trusting(self, looks: bool) -> Iterator[None]:
        """Around micro-steps like one that has been looked at: nothing in them waits for the device."""
        if self.blocks is None:
            self.blocks = Blocks(self.parts() if self.compiles else [], self.name)
        with ExitStack() as stack:
            if surgery.converted(self.model):
                stack.enter_context(surgery.trusting(self.model))
            if not looks and (self.captured.obstacle is None or self.compiles):
                # as while it records or compiles: masks are made without a look at where documents begin
                stack.enter_context(changed(masking_utils, "is_tracing", lambda *_: True))
            stack.enter_context(self.blocks.compiled())
            yield


def _obstacle(run: RunConfig, device: torch.device) -> str | None:
    """Why a stage's micro-steps are not recorded, or None."""
    return "not asked for" if device.type != "cuda" or not run.capture else None
