"""Blocks joined: the result that one process with the whole model would have left, in the same run folder."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from linearize import plain_json, storing
from linearize.distill import pieces
from linearize.distill.blockwise import streams
from linearize.distill.blockwise.job import VALUES, BlockStage, Job
from linearize.distill.callbacks import forget_lines
from linearize.distill.lock import held
from linearize.distill.pieces import Pieces
from linearize.distill.stages import DONE, FINAL
from linearize.errors import CheckpointError, LinearizeError
from linearize.models.cache import sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Joined:
    """What `join` has left.

    Attributes:
        folder: of the run.
        losses: stage -> mean loss of the last steps that were written down.
        freed: bytes of the streams, which have gone.
    """

    folder: Path
    losses: dict[str, float]
    freed: int


def join(job: Job, *, keep_streams: bool = False) -> Joined:
    """Put the blocks' mixers together, as the stages' results, and their metrics line by line.

    Args:
        job: of a folder whose blocks are all trained.
        keep_streams: leave the streams on the disk.

    Raises:
        LinearizeError: some blocks are not trained yet; names them.
        CheckpointError: a block's result is missing, damaged or does not belong to the others.
    """
    job.open()
    with held(job.folder.path), storing.writing(job.folder.path):
        left = [number for number in range(len(job.blocks)) if not job.trained(number)]
        if left:
            raise LinearizeError(
                f"{job.folder.path}: blocks {', '.join(map(str, left))} are not trained yet: linearize blocks train "
                "does that; then join again"
            )
        losses = {}
        for stage in job.stages:
            if not (job.folder.path / stage.folder / DONE).is_file():
                _join(job, stage)
            losses[stage.name] = _last(job, stage)
        freed = 0
        if not keep_streams:
            for stage in job.stages:
                for name in (*(f"{n:03d}" for n in range(len(job.blocks))), VALUES):
                    freed += streams.taken(job.place_of(stage), name)
                    streams.remove(job.place_of(stage), name)
        return Joined(job.folder.path, losses, freed)


def _join(job: Job, stage: BlockStage) -> None:
    numbers = [number for number in range(len(job.blocks)) if job.trains(number)]
    tensors: dict[str, Tensor] = {}
    said: list[dict[str, Any]] = []
    for number in numbers:
        place = job.block_place(stage, number)
        remedy = f"Delete {place.folder} and give linearize blocks train again"
        said.append(storing.read_json(place.folder / DONE, remedy))
        path = place.folder / FINAL
        if not path.is_file() or said[-1].get("sha256") != sha256(path):
            raise CheckpointError(f"{path}: is not what was written (another checksum). {remedy}")
        held_here = Pieces(path)
        tensors |= {name: held_here.whole(name) for name in held_here.shapes}
    if sorted(tensors) != sorted(job.maker.names):
        missing = sorted(set(job.maker.names) ^ set(tensors))[0]
        raise CheckpointError(
            f"{job.folder.path / stage.folder}: its blocks are not those of this model (first that differs: "
            f"{missing}). Delete it and give linearize blocks train again"
        )
    forget_lines(job.folder.metrics, stage.name, after=0)
    lines = _merged(job, stage, numbers)
    before = job.folder.metrics.read_text(encoding="utf-8") if job.folder.metrics.is_file() else ""
    storing.write_file(job.folder.metrics, before + "".join(plain_json.dumps(line) + "\n" for line in lines))
    folder = job.folder.path / stage.folder
    result = folder / FINAL
    pieces.remove(result)
    storing.write_tensors_file(result, {name: tensors[name] for name in job.maker.names})
    storing.write_json(
        folder / DONE,
        {
            **{key: said[0][key] for key in ("steps", "tokens", "stage")},
            "micro_batch": min(one["micro_batch"] for one in said),
            "sha256": sha256(result),
            "blocks": len(job.blocks),
        },
    )


def _merged(job: Job, stage: BlockStage, numbers: list[int]) -> list[dict[str, Any]]:
    """Lines of metrics as one process writes them: layers in order, the norm of all gradients, all blocks' time."""
    found = [_lines(job.block_place(stage, number).metrics) for number in numbers]
    inside = {layer for number in numbers for layer in job.blocks[number]}
    unseen = [layer for layer in job.maker.layers_converted if layer not in inside]
    if unseen:
        log.warning(
            "stage '%s': layers %s have nothing that trains and were in blocks of their own, so their losses are not "
            "known and metrics have none layer by layer", stage.name, ", ".join(map(str, unseen)),
        )  # fmt: skip
    merged = []
    for parts in zip(*found, strict=False):
        if len({part["step"] for part in parts}) != 1:
            break  # blocks went on with another log_every
        layers = [loss for part in parts for loss in part["layers"]]
        first = {key: value for key, value in parts[0].items() if key != "layers"}
        merged.append(
            {
                **first,
                "tokens_per_second": round(1 / sum(1 / part["tokens_per_second"] for part in parts), 1),
                "loss": sum(layers) / len(layers),
                "grad_norm": math.sqrt(sum(part["grad_norm"] ** 2 for part in parts)),
                **({} if unseen else {"layers": layers}),
            }
        )
    return merged


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Delete its folder and give linearize blocks train again"
        ) from error


def _last(job: Job, stage: BlockStage) -> float:
    lines = [line for line in _lines(job.folder.metrics) if line["stage"] == stage.name]
    return float(lines[-1]["loss"]) if lines else math.nan
