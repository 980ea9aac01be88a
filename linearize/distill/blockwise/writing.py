"""The teacher's residual stream before every block, written once: embeddings, then block after block.

One block's weights are in memory at a time. A block reads the stream before it chunk by chunk and writes the one behind
it; what has been written is never computed again, wherever a writer was killed.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize import storing, surgery
from linearize.distill.blockwise import streams
from linearize.distill.blockwise.block import INPUTS, Block
from linearize.distill.blockwise.calibrating import calibrate
from linearize.distill.blockwise.division import named
from linearize.distill.blockwise.job import VALUES, BlockStage, Job
from linearize.distill.blockwise.making import check_finite
from linearize.distill.blockwise.streams import Layout, Stream, Writer
from linearize.distill.lock import held
from linearize.distill.positions import counted_from_zero
from linearize.errors import LinearizeError
from linearize.progress import Meter, count

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What a call of `write` has left.

    Attributes:
        blocks: how many there are.
        ready: those whose inputs are there and that are not trained.
        trained: those that are, or have nothing to train.
        waits: whether more is to be written once some of the ready ones are trained.
    """

    blocks: int
    ready: list[int]
    trained: list[int]
    waits: bool


def write(
    job: Job, *, size: int | None = None, place: Path | None = None, keep: int | None = None
) -> Written:
    """Write what the blocks of a run are trained on, as far as `keep` lets it.

    Args:
        job: recipe, model and run folder; the folder is made, or gone on with.
        size: layers of a block; None for those of the folder, or one.
        place: folder of the streams; None for the run folder's own.
        keep: streams of a stage on the disk at most; those of trained blocks go where the next one is there.

    Raises:
        LinearizeError: the disk has too little room (the message has the figures); others as `Job`.
    """
    if keep is not None and keep < 2:
        raise LinearizeError(f"--keep {keep}: a stream is written from the one before it; give 2 or more")
    with held(job.folder.path), storing.writing(job.folder.path):
        job.begin(size, place)
        announce(job, keep)
        if job.calibrates:
            calibrate(job)
        number = 0
        finished = all(job.trained(n) for n in range(len(job.blocks)))
        while number < len(job.blocks) and (finished or _next(job, number, keep)):
            number += 1
        ready = [n for n in range(len(job.blocks)) if job.written(n) and not job.trained(n)]
        done = [n for n in range(len(job.blocks)) if job.trained(n)]
        return Written(len(job.blocks), ready, done, waits=number < len(job.blocks))


def announce(job: Job, keep: int | None) -> None:
    """Say how much will be on the disk, and refuse what it has no room for.

    Raises:
        LinearizeError: with the figures, and what takes less.
    """
    wanted = present = 0
    each = sum(job.layout(stage).size for stage in job.stages)
    most = len(job.blocks) if keep is None else min(keep, len(job.blocks))
    for stage in job.stages:
        wanted += most * job.layout(stage).size
        if job.maker.hands is not None:
            wanted += values_layout(job, stage).size
        present += sum(
            streams.taken(job.place_of(stage), name)
            for name in (*(f"{n:03d}" for n in range(len(job.blocks))), VALUES)
        )
    job.streams.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(job.streams).free
    log.info(
        "%d blocks of %d layers; their inputs take %s each, %s at once in %s (%s are there, %s free)",
        len(job.blocks), job.size, amount(each), amount(wanted), job.streams, amount(present), amount(free),
    )  # fmt: skip
    needed = max(0, wanted - present)
    if needed > free:
        fits = int((free + present) // each) if each else 0
        fewer = f"--keep {fits} (that many at once), " if fits >= 2 else ""
        raise LinearizeError(
            f"{job.streams}: {amount(needed)} are still to be written ({most} streams of {amount(each)}), and "
            f"{amount(free)} are free: give {fewer}more layers a block (--layers), fewer tokens, or --streams DIR on "
            "another disk, in a new run folder"
        )


def _next(job: Job, number: int, keep: int | None, *, again: bool = False) -> bool:
    """Write the inputs of a block; false where there is no room before others are trained.

    Args:
        job, number, keep: see `write`.
        again: also where the block is trained, since the next one's inputs come from them and were lost.
    """
    name = f"{number:03d}"
    gone = not again and job.trained(number) and _passed(job, number)
    if job.written(number) or gone:
        return True
    if number and not job.written(number - 1) and not _next(job, number - 1, keep, again=True):
        return False
    if keep is not None:
        _tidy(job, number - 1)
        there = [n for n in range(len(job.blocks)) if job.written(n)]
        if len(there) >= keep:
            return False
    block: Block | None = None
    for stage in job.stages:
        if streams.is_whole(job.place_of(stage), name):
            continue
        storing.make_folder(job.place_of(stage))
        writer = Writer(job.place_of(stage), name, job.layout(stage), job.source_of(stage))
        if number == 0:
            block = block or job.maker.table()
            _embed(job, stage, block, writer)
        else:
            block = _behind(job, stage, number - 1, block, writer)
        writer.finish()
    return True


def _passed(job: Job, number: int) -> bool:
    """Whether a later block's inputs are there, so that this one's are needed by its own training alone."""
    return any(job.written(later) for later in range(number + 1, len(job.blocks)))


def _tidy(job: Job, last: int) -> None:
    """Delete the inputs of trained blocks that stand before block `last`, from which the next ones are made."""
    for number in range(last):
        if job.trained(number):
            for stage in job.stages:
                streams.remove(job.place_of(stage), f"{number:03d}")


def _embed(job: Job, stage: BlockStage, table: Block, writer: Writer) -> None:
    dataset = job.dataset(stage)
    title = f"{stage.name}: embeddings"
    with (
        torch.no_grad(),
        counted_from_zero(table.whole),
        job.maker.computing(),
        Meter(title, writer.layout.rows * stage.length, done=_tokens(writer)) as meter,
    ):
        for rows in writer.layout.chunks[writer.done :]:
            found = [
                table.embed(batch["input_ids"], batch).cpu()
                for batch in _batches(job, dataset, rows, stage.batch)
            ]
            writer.put(_sound(torch.cat(found), "the embeddings", writer.layout))
            meter.advance(len(rows) * stage.length)


def _behind(job: Job, stage: BlockStage, number: int, block: Block | None, writer: Writer) -> Block:
    """Write the stream behind a block; gives the block, for the next stage's."""
    before = Stream(job.place_of(stage), f"{number:03d}", writer.layout, job.source_of(stage))
    layers, dataset = job.blocks[number], job.dataset(stage)
    first = None
    if job.maker.hands is not None and job.maker.hands < layers[0]:
        first = Stream(job.place_of(stage), VALUES, values_layout(job, stage), job.source_of(stage))
    if block is None:
        given = first_rows(job, stage, before, first)
        block = job.maker.block(layers, job.said["tuples"], *given)
        job.said["tuples"] = block.tuples
        job.learned(job.maker)
        job.write()
    handing = job.maker.hands in layers
    values = None
    if handing and not streams.is_whole(job.place_of(stage), VALUES):
        values = Writer(job.place_of(stage), VALUES, values_layout(job, stage), job.source_of(stage))
    title = f"{stage.name}: block {number}, {named(layers)}"
    where = f"{named(layers)} of {job.source}"
    teacher = surgery.mode(block, "teacher") if block.places else nullcontext()
    with (
        torch.no_grad(),
        teacher,
        job.maker.computing(),
        Meter(title, writer.layout.rows * stage.length, done=_tokens(writer)) as meter,
    ):
        start = writer.done if values is None else min(writer.done, values.done)
        for chunk, rows in list(enumerate(writer.layout.chunks))[start:]:
            stream, own = before.chunk(chunk), None if first is None else first.chunk(chunk)
            behind, handed = [], []
            for place, batch in zip(
                range(0, len(rows), stage.batch), _batches(job, dataset, rows, stage.batch), strict=True
            ):
                part = slice(place, place + stage.batch)
                taken = None if own is None else shaped(job, own[part]).to(job.device)
                out, found = block.run(stream[part].to(job.device), batch, taken)
                behind.append(out.cpu())
                if handing and found is not None:
                    handed.append(found.flatten(2).cpu())
            if values is not None and values.done == chunk:
                values.put(_sound(torch.cat(handed), f"the values of {where}", values.layout))
            if writer.done == chunk:
                writer.put(_sound(torch.cat(behind), f"the residual stream behind {where}", writer.layout))
            meter.advance(len(rows) * stage.length)
    if values is not None:
        values.finish()
    return block


def first_rows(
    job: Job, stage: BlockStage, before: Stream, first: Stream | None
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """A few rows of a stream, of its batch and of the first layer's values, on which a block is tried."""
    rows = range(min(stage.batch, before.layout.rows))
    [batch] = _batches(job, job.dataset(stage), rows, stage.batch)
    stream = torch.stack([before.row(index) for index in rows])
    values = None if first is None else shaped(job, torch.stack([first.row(index) for index in rows]))
    return stream, batch, values


def shaped(job: Job, flat: Tensor) -> Tensor:
    """The first converted layer's values [..., N V] as [..., N, V]."""
    return flat.unflatten(-1, job.maker.value_shape)


def values_layout(job: Job, stage: BlockStage) -> Layout:
    """Of the stream of the first converted layer's values."""
    own, (heads, width) = job.layout(stage), job.maker.value_shape
    kind = str(job.stream_dtype if job.autocast is None else job.autocast)[6:]
    return Layout(own.rows, own.tokens, heads * width, kind, own.chunk)


def _batches(job: Job, dataset: Any, rows: range, size: int) -> list[dict[str, Tensor]]:
    found = []
    for start in range(rows[0], rows[-1] + 1, size):
        items = [dataset[index] for index in range(start, min(start + size, rows[-1] + 1))]
        keys = [key for key in ("input_ids", *INPUTS) if key in items[0]]
        found.append(
            {key: torch.stack([torch.as_tensor(item[key]) for item in items]).to(job.device) for key in keys}
        )
    return found


def _sound(values: Tensor, what: str, layout: Layout) -> Tensor:
    """What is about to be written.

    Raises:
        NotFiniteError: it is not finite.
        LinearizeError: it is of another dtype than the streams.
    """
    if values.dtype != layout.kind:
        raise LinearizeError(
            f"{what}: is {str(values.dtype)[6:]} where the embeddings are {layout.dtype}: set run.weights=float32 in a "
            "new run folder"
        )
    check_finite(values, what)
    return values


def _tokens(writer: Writer) -> int:
    return sum(len(rows) for rows in writer.layout.chunks[: writer.done]) * writer.layout.tokens


def amount(size: float) -> str:
    """Bytes in words."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{count(int(size))} bytes"
