"""What all block-wise commands share: recipe and model, the run folder, and what its blocks are."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from linearize import launched, models, objectives, storing, surgery
from linearize.config.schedule import Over
from linearize.config.schema import Recipe, StageConfig
from linearize.distill import calibrate, memory, texts
from linearize.distill.blockwise import streams
from linearize.distill.blockwise.division import blocks
from linearize.distill.blockwise.making import Maker
from linearize.distill.blockwise.parts import Parts
from linearize.distill.blockwise.streams import Layout
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.distill.folder import RunFolder, facts, plan_json
from linearize.distill.identity import digest
from linearize.distill.planned import planned
from linearize.distill.stages import StagePlace
from linearize.errors import LinearizeError, RecipeError, RunFolderError, raise_together
from linearize.surgery.inspection import skeleton
from linearize.surgery.schema import put, shape_of

log = logging.getLogger(__name__)

FILE = "blocks.json"
VALUES = "values"
"""Name of the stream of the first converted layer's values."""


@dataclass(frozen=True)
class BlockStage:
    """One stage that trains block by block.

    Attributes:
        index: its number in the recipe, from 1.
        length: tokens of a sequence.
        batch: sequences that go through a block at once while streams are written.
    """

    index: int
    name: str
    stage: StageConfig
    length: int
    batch: int

    @property
    def folder(self) -> str:
        """Name of its folder, in the run folder and among the streams."""
        return f"stage-{self.index}-{self.name}"


def block_stages(recipe: Recipe) -> list[BlockStage]:
    """The stages that a recipe begins with and in which layers learn apart.

    Raises:
        RecipeError: there are none, or one asks for what blocks cannot give.
    """
    found: list[BlockStage] = []
    problems: list[str] = []
    for index, (name, stage) in enumerate(recipe.stages.items(), start=1):
        if objectives.level_of(stage.objective) != "layer":
            break
        data = recipe.data.of(stage)
        own = recipe.data.length if stage.data is None or stage.data.length is None else stage.data.length
        path = f"stages.{name}"
        if stage.grad_clip and stage.clip_by != "layer":
            problems.append(
                f"{path}.clip_by: all clips by the norm over all layers, which no block knows; set "
                f"{path}.clip_by=layer (or {path}.grad_clip=0), for linearize run too where both are compared"
            )
        if not Over.of(own).constant:
            problems.append(
                f"{path}.data.length: changes within the stage, and a shorter sequence has other hidden states than "
                "the part of a longer one: give one length"
            )
        if texts.of_teacher(data):
            problems.append(
                f"{path}.data: the teacher writes its text as a whole model: let linearize sample write it where it "
                "fits, and give data.source those files"
            )
        batch = int(min(Over.of(stage.batch_size).values))
        at_once = batch if stage.micro_batch == "auto" else int(stage.micro_batch)
        found.append(BlockStage(index, name, stage, data.length, at_once))
    if recipe.calibrate.tokens and texts.of_teacher(recipe.data) and not problems:
        problems.append(
            "calibrate.tokens: of text that the teacher writes as a whole model: let linearize sample write it where "
            "it fits, and give data.source those files, or set calibrate.tokens=0"
        )
    if not found:
        problems.append(
            "stages: the first one is no attention transfer (an objective per layer on the mixers), and only there "
            f"layers are independent; valid: {', '.join(sorted(objectives.names('layer')))}"
        )
    if problems:
        raise RecipeError(problems)
    return found


class Job:
    """A block-wise run, as every command of it sees it.

    Args:
        model: the MODEL argument.
        recipe: composed.
        out: the run folder.
        name: what the user called the recipe.

    Raises:
        LinearizeError: recipe and model do not go together, or ask for what blocks cannot give; or this process was
            launched with others.
    """

    def __init__(self, model: str, recipe: Recipe, out: str | Path, name: str = "") -> None:
        self.source, self.recipe, self.recipe_name = model, recipe, name or recipe.description
        self.folder = RunFolder(Path(out))
        self.stages = block_stages(recipe)
        if launched.several():
            raise LinearizeError(
                f"linearize blocks in {launched.count()} processes that were launched together: each of its workers is "
                "a process by itself; give the command once for each card, without torchrun"
            )
        self.device = resolve_device(recipe.run)
        self.autocast = resolve_precision(recipe.run, self.device)
        self.weights = resolve_weights(recipe.run, self.device)
        self.said: dict[str, Any] = {}
        self.size = 0
        self._data: dict[str, Any] = {}
        if self.autocast is not None and self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as a whole run

    # The folder

    def command(self, what: str) -> str:
        """The command that does something with the folder; its own recipe holds the overrides."""
        out = shlex.quote(str(self.folder.path))
        return f"linearize {what} {shlex.quote(self.source)} {out}/recipe.yaml --out {out}"

    @property
    def file(self) -> Path:
        """What the folder says of its blocks."""
        return self.folder.path / FILE

    def begin(self, size: int | None, place: Path | None) -> None:
        """Make the folder a block-wise run, or go on with the one that it holds.

        Args:
            size: layers of a block; None for those of the folder, or one.
            place: folder of the streams; None for the run folder's own.

        Raises:
            RunFolderError: it holds another run, or blocks of another size.
        """
        known = self.folder.recipe.is_file()
        found = self.folder.check(self.source, self.recipe, resume=known)
        if known and not self.file.is_file():
            raise RunFolderError(
                f"{self.folder.path} holds a run that is not block by block: choose another folder with --out"
            )
        where = place or self.folder.path / "streams"
        if self.file.is_file():
            self.read()
            differing = [
                f"--layers {size}, it has {self.said['size']}"
                if size not in (None, self.said["size"])
                else "",
                f"--streams {place}, it has {self.said['streams']}"
                if place and str(place.absolute()) != self.said["streams"]
                else "",
            ]
            if any(differing):
                raise RunFolderError(
                    f"{self.folder.path} holds blocks of another kind ({'; '.join(filter(None, differing))}): leave "
                    "that out, or choose another folder with --out"
                )
        else:
            self.said = {
                "size": size or 1,
                "streams": str(where.absolute()),
                "tuples": None,
                **self._now(found),
            }
        self._known()
        self.folder.create(self.recipe, plan_json(self._plan()), {**facts(self), **found})
        self.write()

    def open(self) -> None:
        """Look at a folder that `begin` has made.

        Raises:
            RunFolderError: it holds no block-wise run, or one of another recipe, model or precision.
        """
        if not self.file.is_file():
            raise RunFolderError(
                f"{self.folder.path} holds no blocks: write their inputs first, with linearize blocks write"
            )
        self.folder.check(self.source, self.recipe, resume=True)
        self.read()
        self._known()

    def write(self) -> None:
        """Keep what is known of the blocks."""
        storing.write_json(self.file, self.said)

    def read(self) -> None:
        """What the folder says now, while others write.

        Raises:
            RunFolderError: its streams are of another precision.
        """
        remedy = f"Delete {self.file} and give linearize blocks write again"
        self.said = storing.read_json(self.file, remedy)
        now = self._now(self.said)
        differing = [f"{key}: {self.said.get(key)} -> {now[key]}" for key in ("weights", "passes")
                     if self.said.get(key) != now[key]]  # fmt: skip
        if differing:
            raise RunFolderError(
                f"{self.folder.path}: its streams were written in another precision ({', '.join(differing)}): give "
                "run.precision and run.weights as there, or choose another folder with --out"
            )

    def _known(self) -> None:
        self.size = int(self.said["size"])
        self.streams = Path(self.said["streams"])

    def _now(self, found: dict[str, Any]) -> dict[str, Any]:
        return {
            "teacher": found.get("fingerprint") or found.get("teacher"),
            "weights": str(self.weights)[6:],
            "passes": "float32" if self.autocast is None else str(self.autocast)[6:],
        }

    # The model

    @cached_property
    def parts(self) -> Parts:
        """The teacher."""
        return Parts(self.source, self.weights)

    @cached_property
    def maker(self) -> Maker:
        """What makes blocks of it."""
        made = Maker(self.parts, self.recipe, self.device, self.autocast)
        for path, turning in self.said.get("turning", {}).items():
            put(made.plan, path, turning)
        return made

    @cached_property
    def blocks(self) -> list[range]:
        """Layers of each block."""
        return blocks(len(self.parts.layers), self.size)

    def trains(self, number: int) -> bool:
        """Whether a block has anything that trains."""
        layers = [f"{self.parts.layers[layer]}." for layer in self.blocks[number]]
        return any(name.startswith(tuple(layers)) for name in self.maker.names)

    def learned(self, made: Maker) -> None:
        """Keep what loading a block has shown."""
        shapes = {path: shape_of(made.plan, path) for path in made.plan["layers"]}
        self.said["turning"] = {
            path: {"rotary": shape.rotary, "turns": shape.turns} for path, shape in shapes.items()
        }

    def _plan(self) -> surgery.Plan:
        wrong = list[LinearizeError]()
        plan = planned(skeleton(self.parts.config), self.recipe, wrong)
        raise_together(wrong, f"{self.recipe_name} on {self.source}")
        return plan

    # Text and streams

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's."""
        return models.load_tokenizer(models.resolve(self.source))

    def dataset(self, stage: BlockStage) -> Any:
        """A stage's sequences."""
        if stage.name not in self._data:
            place: Any = SimpleNamespace(name=stage.name, index=stage.index)
            self._data[stage.name] = texts.dataset(self.recipe, self.recipe, self.tokenizer, place)
        return self._data[stage.name]

    def layout(self, stage: BlockStage, width: int | None = None) -> Layout:
        """Of a stage's streams, or of one of another width."""
        width = width or self.maker.width
        return Layout.of(len(self.dataset(stage)), stage.length, width, self.stream_dtype, stage.batch)

    @property
    def stream_dtype(self) -> torch.dtype:
        """What the residual stream is in: embeddings of the weights' dtype, to which outputs are added."""
        return self.weights

    def source_of(self, stage: BlockStage) -> dict[str, Any]:
        """What decides the numbers of a stage's streams."""
        key = f"{stage.name} text"
        if key not in self._data:
            self._data[key] = digest(self.dataset(stage))
        return {
            "teacher": self.said["teacher"],
            "precision": [self.said["weights"], self.said["passes"]],
            "text": self._data[key],
        }

    def place_of(self, stage: BlockStage) -> Path:
        """Where a stage's streams are."""
        return self.streams / stage.folder

    # What is done

    def block_place(self, stage: BlockStage, number: int) -> StagePlace:
        """Where a block of a stage trains."""
        folder = self.folder.path / stage.folder / f"block-{number:03d}"
        less = memory.less_for_stage(stage.name, stage.stage, whole_model=False)
        return StagePlace(
            index=stage.index,
            count=len(self.recipe.stages),
            name=stage.name,
            folder=folder,
            metrics=folder / "metrics.jsonl",
            resume_command=self.command("blocks train"),
            less_memory=lambda: memory.advice(
                less, "smaller blocks in a new run folder", self.command("blocks train")
            ),
            part=f", block {number}",
        )

    def trained(self, number: int) -> bool:
        """Whether a block has been trained in all stages, or has nothing to train."""
        return not self.trains(number) or all(self.block_place(s, number).done for s in self.stages)

    def written(self, number: int) -> bool:
        """Whether a block's inputs are there in all stages."""
        return all(streams.is_whole(self.place_of(stage), f"{number:03d}") for stage in self.stages)

    @property
    def calibration(self) -> Path:
        """Folder of the calibration's result."""
        return self.folder.stage(0, calibrate.NAME)

    @property
    def calibrates(self) -> bool:
        """Whether the mixers' start is found in closed form."""
        return self.recipe.calibrate.tokens > 0 and self.maker.can_calibrate

    @property
    def calibrated(self) -> bool:
        """Whether that has been done."""
        return calibrate.is_done(self.calibration)

    @property
    def place(self) -> Any:
        """As a run has it, for `facts`."""
        return SimpleNamespace(sharded=False)
