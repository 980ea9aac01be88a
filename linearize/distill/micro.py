"""How many sequences of an optimizer step are on the device at once: as asked for, or as many as fit.

A step's gradient is the same whatever that number is: losses are sums over its tokens (or sequences, or pairs), divided
by those of the whole step. Where memory runs out the step is begun again with half as many, under the same random
state, and the number stays for the rest of the stage; a checkpoint remembers it. A stage whose first pass takes more
than the others (`passes`: it runs part by part) makes that one with fewer sequences, for nothing but the look, before
it settles for fewer in all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.config.schema import StageConfig
from linearize.distill import memory, state

log = logging.getLogger(__name__)

CAREFUL = 8
"""Sequences at most where an allocator promises more than there is, and the system ends the process instead."""


class MicroBatch:
    """The sequences that are on the device at once.

    Args:
        stage: its `batch_size` and `micro_batch`.
        name: of the stage, for what is said.
        shapes: batches that will come to this process, as sequences and tokens of each.
        device: where it trains.
        alone: whether this process may begin a step again by itself; in a sharded model the others compute with it.

    Attributes:
        sizes: how many, of each shape; always a divisor of the batch.
        size: that of the newest batch.
        found: whether memory, not the recipe, decides.
        halved: whether it was too many in the newest step.
    """

    def __init__(
        self,
        stage: StageConfig,
        name: str,
        shapes: list[tuple[int, int]],
        device: torch.device,
        alone: bool = True,
    ) -> None:
        self.name = name
        self.device = device
        self.found = stage.micro_batch == "auto"
        self.alone = alone
        self.sizes: dict[tuple[int, int], int] = {}
        for batch, length in shapes:
            most = memory.TOKENS // length if device.type == "cuda" else CAREFUL
            at_once = divisor(batch, min(batch, most if self.found else int(stage.micro_batch)))
            self.sizes[batch, length] = at_once
        self.size = self.sizes[shapes[0]]
        self.halved = False

    def run(
        self,
        batch: dict[str, Tensor],
        part: Callable[[dict[str, Tensor]], Tensor],
        undo: Callable[[], Any],
        looks: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """One optimizer step's passes.

        Args:
            batch: tensors of all sequences.
            part: forward and backward of some of them; gives their share of the step's losses.
            undo: forgets the gradients of a step that is begun again.
            looks: whether a pass takes more memory now than those behind it will.

        Returns:
            The sum of what `part` gave.

        Raises:
            RuntimeError, MemoryError: what the allocator raised, where not even one sequence fits, or as many as were
                asked for do not.
        """
        shape: tuple[int, int] = tuple(batch["input_ids"].shape)  # type: ignore[assignment]
        rng = state.rng_tensors() if self.found else {}
        self.halved = looked = False
        while True:
            self.size = self.sizes[shape]
            try:
                return self._whole(batch, part)
            except Exception as error:
                if not (self.alone and self.found and self.size > 1 and memory.is_out_of_memory(error)):
                    raise
            # out of the handler: its frames, and the tensors in them, are gone
            self._begin_again(undo, rng)
            if looks() and not looked:
                self._look(batch, part)
                self._begin_again(undo, rng)
                looked = True
                continue
            self.no_more_than(self.size // 2, shape)
            self.halved = True
            log.warning(
                "stage '%s': %d sequences at once do not fit into memory; going on with %d, and the same batch_size %d",
                self.name,
                self.size,
                self.sizes[shape],
                shape[0],
            )

    def _begin_again(self, undo: Callable[[], Any], rng: dict[str, Tensor]) -> None:
        undo()
        memory.release(self.device)
        state.restore_torch(rng)

    def _look(self, batch: dict[str, Tensor], part: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """The first pass, of as many sequences as fit; its gradients are nobody's."""
        size = self.size
        while True:
            size //= 2
            try:
                part({name: tensor[:size] for name, tensor in batch.items()})
            except Exception as error:
                if size == 1 or not memory.is_out_of_memory(error):
                    raise
            else:
                break
            memory.release(self.device)
        log.info(
            "stage '%s': the first pass, which takes more memory than the others, was made of %d sequences; the "
            "others are tried with %d",
            self.name,
            size,
            self.size,
        )

    def _whole(self, batch: dict[str, Tensor], part: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        total: Tensor | None = None
        for start in range(0, len(batch["input_ids"]), self.size):
            values = part({name: tensor[start : start + self.size] for name, tensor in batch.items()})
            total = values if total is None else total + values
        assert total is not None
        return total

    def no_more_than(self, size: int, shape: tuple[int, int]) -> None:
        """At most as many of this shape, and of no other one more tokens."""
        size = divisor(shape[0], min(self.sizes[shape], size))
        tokens = size * shape[1]
        for (batch, length), before in self.sizes.items():
            if before * length > tokens or (batch, length) == shape:
                self.sizes[batch, length] = divisor(batch, min(before, max(1, tokens // length)))

    def sizes_found(self) -> dict[str, int]:
        """What a checkpoint holds for `remember`."""
        return {f"{batch}x{length}": size for (batch, length), size in self.sizes.items()}

    def remember(self, saved: Any) -> None:
        """Take what a checkpoint holds, unless the recipe says how many."""
        if not self.found or not isinstance(saved, dict):
            return
        for (batch, length), most in self.sizes.items():
            size = saved.get(f"{batch}x{length}")
            if isinstance(size, int) and 0 < size <= most and batch % size == 0:
                self.sizes[batch, length] = size
        self.size = next(iter(self.sizes.values()))


def divisor(batch: int, most: int) -> int:
    """The largest divisor of `batch` that is at most `most`: every pass then has one shape."""
    return next(size for size in range(max(1, most), 0, -1) if batch % size == 0)
