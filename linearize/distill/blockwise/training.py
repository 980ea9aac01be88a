"""Blocks trained by themselves, each on the stream that the teacher gives it; workers take what nobody else has.

A block sees the batches, rates and draws of a whole run, and its gradients are those: the loss is a mean over all
converted layers of the model, window dropout is drawn for all of them, and gradients are clipped layer by layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from linearize import storing, surgery
from linearize.distill import stages, window_dropout
from linearize.distill.blocks import Place
from linearize.distill.blockwise.block import Block
from linearize.distill.blockwise.calibrating import load_start
from linearize.distill.blockwise.division import named
from linearize.distill.blockwise.job import VALUES, Job
from linearize.distill.blockwise.streams import Stream
from linearize.distill.blockwise.writing import first_rows, values_layout
from linearize.distill.lock import held
from linearize.distill.transfer import TransferTrainer
from linearize.errors import RunFolderError
from linearize.surgery import LinearizedAttention

log = logging.getLogger(__name__)

STREAM = "stream"
FIRST = "first_values"
"""Keys of a batch: what goes into the block, and the first converted layer's values."""


@dataclass(frozen=True)
class Worked:
    """What a worker has left.

    Attributes:
        trained: blocks that it has trained.
        others: blocks that other workers are at.
        waiting: blocks whose inputs are not written yet.
        left: blocks of the run that are not trained, in all.
    """

    trained: list[int]
    others: list[int]
    waiting: list[int]
    left: list[int]


class Streamed(Dataset[dict[str, Tensor]]):
    """A stage's sequences with the stream before a block, and the first layer's values where they are mixed."""

    def __init__(self, dataset: Any, stream: Stream, first: Stream | None, job: Job) -> None:
        self.dataset, self.stream, self.first = dataset, stream, first
        self._heads = job.maker.value_shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {**self.dataset[index], STREAM: self.stream.row(index)}
        if self.first is not None:
            item[FIRST] = self.first.row(index).unflatten(-1, self._heads)
        return item


class BlockTrainer(TransferTrainer):
    """Attention transfer of a block: `model` is a `Block`."""

    trained_model: Block  # type: ignore[assignment]

    @property
    def count(self) -> int:
        return self.trained_model.total

    @property
    def pass_on(self) -> Callable[[nn.Module, dict[str, Tensor]], Any]:
        return lambda model, batch: self.trained_model.run(batch[STREAM], batch, batch.get(FIRST))

    def find_droppable(self, model: nn.Module) -> list[bool]:
        return window_dropout.able([layer.mixer for layer in surgery.converted(model)])

    def draw(self, rate: float, step: int) -> list[bool]:
        drawn = window_dropout.draws(rate, self.count, self.seed, step)
        return [drawn[place] for place in self.trained_model.places]

    def compiled_parts(self) -> list[nn.Module | Place]:
        block = self.trained_model
        layers = [block.get_submodule(path) for path in block.paths]
        parts: list[nn.Module | Place] = [
            part
            for layer in layers
            for part in layer.children()
            if not any(isinstance(inner, LinearizedAttention) for inner in part.modules())
        ]
        return parts + self.functions()


def train(job: Job, wanted: list[int] | None = None) -> Worked:
    """Train blocks until there are none left that are written and that nobody else is at.

    Args:
        job: of a folder in which blocks have been written.
        wanted: numbers of the blocks; None for all.

    Raises:
        CheckpointError: a stream is damaged, cut short, or of another teacher, text or precision.
        RunStopped: stopped on request; the same command goes on.
        LinearizeError: as `Job`, and as training raises.
    """
    job.open()
    shared = [f"run.{field}" for field, alone in (("shard", "none"), ("sequence", 1))
              if getattr(job.recipe.run, field) not in ("auto", alone)]  # fmt: skip
    if shared:
        log.info("%s: a block trains in one process; it is the later stages' alone", " and ".join(shared))
    numbers = list(range(len(job.blocks))) if wanted is None else wanted
    trained: list[int] = []
    others: list[int] = []
    waiting: list[int] = []
    for number in numbers:
        if job.trained(number):
            continue
        if not job.written(number) or (job.calibrates and not job.calibrated):
            waiting.append(number)
            continue
        with ExitStack() as stack:
            try:
                for stage in job.stages:
                    stack.enter_context(held(job.block_place(stage, number).folder))
            except RunFolderError:
                others.append(number)
                continue
            if not job.trained(number):  # another one may just have ended
                _train(job, number)
                trained.append(number)
    left = [number for number in range(len(job.blocks)) if not job.trained(number)]
    return Worked(trained, others, waiting, left)


def _train(job: Job, number: int) -> None:
    """One block, in all stages."""
    job.read()  # what writing has shown since
    block: Block | None = None
    for stage in job.stages:
        place, layout, source = job.block_place(stage, number), job.layout(stage), job.source_of(stage)
        folder, name = job.place_of(stage), f"{number:03d}"
        stream = Stream(folder, name, layout, source)
        first = None
        hands = job.maker.hands
        if hands is not None and hands < job.blocks[number][0]:
            first = Stream(folder, VALUES, values_layout(job, stage), source)
        if block is None:
            block = job.maker.block(
                job.blocks[number], job.said["tuples"], *first_rows(job, stage, stream, first)
            )
            load_start(job, block)
        if place.done:
            stages.restore(block, stage.stage, place)
            continue
        for read in (stream, *([] if first is None else [first])):
            read.check(f"block {number}: checking {read.path.name}")
        log.info(
            "stage '%s', block %d of %d: %s", stage.name, number, len(job.blocks), named(job.blocks[number])
        )
        with storing.writing(place.folder):
            stages.train(
                block,
                stage.stage,
                place,
                run=job.recipe.run,
                dataset=Streamed(job.dataset(stage), stream, first, job),
                length=stage.length,
                autocast=job.autocast,
                teacher=None,
                transfer=BlockTrainer,
            )
