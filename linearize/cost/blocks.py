"""What transfer block by block takes: disk, memory of a card and hours, by the number of layers of a block.

Formulas are those of `linearize plan` (`memory`, `speed`) for a model of as many layers as a block has; writing is one
forward pass over all layers. Nothing of it is measured: reading and writing the streams has to keep up, and the rates
that it takes are given beside.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from linearize import surgery
from linearize.bench import flops
from linearize.config.course import Course
from linearize.config.schema import Recipe
from linearize.cost import memory, speed
from linearize.cost.cards import Card
from linearize.cost.memory import Sizes
from linearize.cost.stages import sizes_of
from linearize.distill.batches import firsts
from linearize.distill.blockwise.division import blocks
from linearize.distill.blockwise.job import BlockStage, block_stages
from linearize.distill.micro import divisor
from linearize.distill.trainable import prepare
from linearize.errors import LinearizeError
from linearize.models import experts
from linearize.surgery.inspection import skeleton

LAYERS = (1, 2, 4, 5, 8, 10, 16, 20)
"""Of a block, that are shown where there are as many."""
WEIGHT = 2
"""Bytes of a frozen weight, and of a number of the stream, on a card."""


@dataclass(frozen=True)
class Row:
    """Blocks of one size.

    Attributes:
        layers: of a block.
        blocks: how many.
        disk: bytes of all streams.
        least: bytes with two streams of a stage at once (`--keep 2`).
        write, train: bytes of a card.
        block_hours: of training one block on one card.
        hours: of training all of them on all cards.
        read: bytes a second that a card's streams are read at.
    """

    layers: int
    blocks: int
    disk: float
    least: float
    write: float
    train: float
    block_hours: float
    hours: float
    read: float


@dataclass(frozen=True)
class BlocksPlan:
    """A recipe's block-wise stages on a model.

    Attributes:
        teacher: parameters.
        stream: bytes of one stage's streams each, by stage.
        write_hours: of writing all of them on one card.
    """

    recipe: str
    count: int
    card: Card
    teacher: int
    layers: int
    stream: dict[str, float]
    write_hours: float
    rows: list[Row]

    def heading(self, model: str) -> list[str]:
        """What is planned."""
        each = "; ".join(f"{name} {gigabytes(size)}" for name, size in self.stream.items())
        return [
            f"teacher     {model}, {self.teacher:,} parameters in {self.layers} layers",
            f"one stream  {each}",
            f"cards       {self.count} x {self.card.name}, {self.card.usable / 2**30:.0f} GiB of each to be had",
        ]

    def cells(self) -> list[dict[str, str]]:
        """The table's lines as text."""
        found = []
        for row in self.rows:
            fits = row.train <= self.card.usable
            values = (
                str(row.layers),
                str(row.blocks),
                gigabytes(row.disk),
                gigabytes(row.least),
                f"{row.write / 2**30:.1f}",
                f"{row.train / 2**30:.1f}",
                f"{row.block_hours:.2f}" if fits else "does not fit",
                f"{row.hours:.2f}" if fits else "",
                f"{row.read / 1e6:,.0f}" if fits else "",
            )
            found.append(dict(zip(COLUMNS, values, strict=True)))
        return found

    def sentences(self) -> list[str]:
        """What the numbers rest on."""
        total = next(iter(self.rows))
        rate = total.disk / max(self.write_hours, 1e-9) / 3600 / 1e6
        return [
            f"writing: {self.write_hours:.2f} hours on one card, and {rate:,.0f} MB/s to the disk with blocks of one "
            "layer; it is one process",
            f"hours of training are on {self.count} card{'s' if self.count > 1 else ''}, a worker each; calculated, "
            "not measured, and only as long as the disk keeps up",
        ]


COLUMNS = ("layers", "blocks", "disk", "disk, --keep 2", "GiB, writing", "GiB, training", "hours, a block",
           "hours, all", "MB/s read, a card")  # fmt: skip


def plan(config: Any, recipe: Recipe, count: int, card: Card, *, name: str) -> BlocksPlan:
    """What blocks of several sizes need.

    Args:
        config: of the teacher.
        recipe: composed and checked.
        count, card: what works at once.
        name: of the recipe.

    Raises:
        LinearizeError: as `cost.stages.plan`.
        RecipeError: as `block_stages`.
    """
    wanted = block_stages(recipe)
    base: Any = skeleton(config)
    teacher = sum(parameter.numel() for parameter in base.parameters())
    if experts.active(base) < teacher:
        raise LinearizeError(
            f"{config.model_type}: a mixture of experts; the plan of blocks has formulas for dense models alone so far"
        )
    with torch.device("meta"):
        student: Any = surgery.convert(base, recipe.mixer, recipe.layers, recipe.mixers).eval()
    streams: dict[str, float] = {}
    parts: list[_Part] = []
    for stage in wanted:
        with torch.device("meta"):
            prepared = prepare(student, stage.stage)
        parts.append(_Part(stage, prepared, name, teacher, card))
        streams[stage.name] = parts[-1].stream
    layers = parts[0].sizes.layers
    sizes = [size for size in LAYERS if size < layers] + [layers]
    rows = [_row(parts, size, layers, count) for size in sizes]
    hours = sum(part.forward * part.rows * part.stage.length for part in parts) / (speed.PRODUCTS * card.peak)
    return BlocksPlan(name, count, card, teacher, layers, streams, hours / 3600, rows)


class _Part:
    """One stage in numbers."""

    def __init__(self, stage: BlockStage, model: Any, recipe: str, teacher: int, card: Card) -> None:
        self.stage, self.card = stage, card
        self.sizes = sizes_of(model, "transfer", recipe, teacher, apart=False)
        self.course = Course.of(stage.stage, stage.length)
        self.rows = firsts(self.course)[-1]
        self.stream = float(self.rows * stage.length * self.sizes.hidden * WEIGHT)
        self.flops = flops.per_token(model, "transfer", stage.length)
        body = self.sizes.total - self.sizes.whole - 2 * self.sizes.head
        text = model.config.get_text_config()
        self.forward = 2.0 * body + flops.softmax_layer(text, stage.length) * self.sizes.layers
        self.each = WEIGHT * body / self.sizes.layers

    def of(self, layers: int) -> Sizes:
        """A block as a model: its layers, and neither table nor head."""
        share = layers / self.sizes.layers
        own = int(self.sizes.whole * share)
        frozen = int(layers * self.each / WEIGHT)
        return dataclasses.replace(
            self.sizes, total=frozen + own, trained=int(self.sizes.trained * share), whole=own, layers=layers
        )

    def bytes(self, layers: int, micro: int) -> float:
        """Of a card that trains."""
        found = memory.parts(self.of(layers), "transfer", micro * self.stage.length)
        return sum(found.values())

    def micro(self, layers: int) -> int:
        """Sequences at once that fit, or one."""
        batch = min(self.stage.batch, max(phase.batch for phase in self.course.phases))
        while batch > 1 and self.bytes(layers, batch) > self.card.usable:
            batch = divisor(batch, batch // 2)
        return batch

    def seconds(self, layers: int) -> float:
        """Of training one block."""
        tokens = self.micro(layers) * self.stage.length
        share = self.flops * layers / self.sizes.layers
        each = speed.seconds(self.of(layers), "transfer", share, tokens, self.card)
        return each * self.course.tokens


def _row(parts: list[_Part], size: int, layers: int, count: int) -> Row:
    number = len(blocks(layers, size))
    seconds = sum(part.seconds(size) for part in parts)
    stream = sum(part.stream for part in parts)
    passes = sum(part.course.tokens * part.sizes.hidden * WEIGHT for part in parts)
    rounds = -(-number // count)
    return Row(
        layers=size,
        blocks=number,
        disk=number * stream,
        least=min(2, number) * stream,
        write=max(size * part.each + memory.WORKSPACE + _pass(part) for part in parts),
        train=max(part.bytes(size, part.micro(size)) for part in parts),
        block_hours=seconds / 3600,
        hours=rounds * seconds / 3600,
        read=passes / seconds,
    )


def _pass(part: _Part) -> float:
    """Bytes of a forward pass through one layer: three of its inner width and four of the stream, in sixteen bits."""
    width = 3 * part.sizes.inner + 4 * part.sizes.hidden
    return float(WEIGHT * part.stage.batch * part.stage.length * width)


def gigabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e12:,.2f} TB" if size >= 1e12 else f"{size / 1e9:,.1f} GB"
