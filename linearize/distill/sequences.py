"""Sequence parallelism: several processes hold each sequence of a batch, a stretch of it each.

Processes stand in a mesh of torch's, (data, sequence): those of a row have the same sequences, and columns others.
Every process reads whole sequences, which are numbers of tokens, and cuts its own stretch out on the device. What
tokens predict is looked up before the cut, and losses are divided by the whole step's tokens, so that gradients are
sums over all processes, in shards too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from linearize import models
from linearize.across import Across
from linearize.config import variants
from linearize.config.schedule import Over
from linearize.config.schema import Recipe, RunConfig, StageConfig
from linearize.distill import processes
from linearize.errors import LinearizeError, RecipeError, UnsupportedModelError, collected
from linearize.surgery import skeleton
from linearize.surgery.spreading import refusal, spreading

COVERED = (
    "attention_output",
    "attention_output_projected",
    "attention_output_relative",
    "hidden_alignment",
    "next_token",
    "logits_kl",
)
"""Objectives that are sums over tokens, or means over as many in each process."""

_meshes: dict[tuple[Any, int], DeviceMesh] = {}
"""A group of processes costs a connection: one mesh a run."""


class Sequences:
    """How a stage's batches are shared out.

    Args:
        run: its `sequence`.
        device: of this process.

    Attributes:
        size: processes that hold a sequence together; 1 where each holds its own.
    """

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.size = run.sequence if wanted(run) else 1
        self._mesh = _mesh(self.size, device) if self.size > 1 else None

    @property
    def shares(self) -> int:
        """Groups of processes with sequences of their own."""
        return processes.count() // self.size

    @property
    def share(self) -> int:
        """Number of this one's, from 0."""
        return processes.rank() // self.size

    @contextmanager
    def spread(
        self, batch: dict[str, Tensor], models: Iterable[nn.Module | None], *, again: bool = False
    ) -> Iterator[tuple[dict[str, Tensor], Across | None]]:
        """Inside, passes of the models take what is given: this process's part of a batch, and who has the rest.

        Args:
            batch: tensors [B, T, ...] of whole sequences.
            models: that pass over it, and over the part alone.
            again: mixers are computed once more in backward, see `mixers.spread`.
        """
        if self._mesh is None:
            yield batch, None
            return
        assert "attention_mask" not in batch, "packed sequences have no padding"
        group = self._mesh["sequence"]
        across = Across(group.get_group(), group.get_local_rank(), self.size, batch["position_ids"])
        with spreading([model for model in models if model is not None], across, again=again):
            yield {name: across.own(x) for name, x in batch.items()}, across


def wanted(run: RunConfig) -> bool:
    """Whether several processes hold each sequence."""
    return processes.several() and run.sequence > 1


def _mesh(size: int, device: torch.device) -> DeviceMesh:
    key = (dist.group.WORLD, size)
    if key not in _meshes:
        shape = (processes.count() // size, size)
        _meshes[key] = init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence"))
    return _meshes[key]


def groups(run: RunConfig, count: int) -> int:
    """Of so many processes, how many take sequences of their own.

    Raises:
        RecipeError: they cannot be shared out.
    """
    size = run.sequence
    if count == 1:
        return 1
    if count % size:
        raise RecipeError(
            [
                f"run.sequence: {size} processes are to hold each sequence, and {count} are no multiple of that: start "
                f"a multiple of {size}, or set run.sequence to a divisor of {count}"
            ]
        )
    return count // size


def check(recipe: Recipe, source: str, config: Any, errors: list[LinearizeError]) -> None:
    """Write down what of a recipe or its teachers cannot be spread, before any weight is loaded.

    Args:
        recipe: its `run.sequence` counts.
        source: of the teacher.
        config: its own.
        errors: receives all that is wrong.
    """
    if not wanted(recipe.run):
        return
    problems = []
    for name, stage in recipe.stages.items():
        problems += [f"stages.{name}.{found}" for found in _stage(recipe, stage)]
    problems += _mixers(recipe)
    if problems:
        remedy = "with run.sequence=1 each process has whole sequences"
        errors.append(RecipeError([f"{problem} ({remedy})" for problem in problems]))
    teachers = {source: config}
    with collected(errors):
        if recipe.run.teacher:
            teachers[recipe.run.teacher] = models.load_config(recipe.run.teacher)
        for name, of_it in teachers.items():
            why = refusal(skeleton(of_it))
            if why is not None:
                raise UnsupportedModelError(
                    f"run.sequence: {name} cannot be spread over processes: {why}; set run.sequence=1"
                )


def _stage(recipe: Recipe, stage: StageConfig) -> Iterator[str]:
    size = recipe.run.sequence
    for objective in stage.objective:
        if objective not in COVERED:
            yield (
                f"objective: '{objective}' is no sum over tokens that each of run.sequence={size} processes computes "
                f"by itself; those that are: {', '.join(COVERED)}"
            )
    if Over.of(stage.window_dropout).most > 0:
        yield "window_dropout: which queries count without their window is not known across processes yet"
    given = (
        stage.data.length if stage.data is not None and stage.data.length is not None else recipe.data.length
    )
    for length in sorted(set(Over.of(given).values)):
        if length % size:
            yield f"data.length: {length} tokens are not as many for each of run.sequence={size} processes"


def _mixers(recipe: Recipe) -> Iterator[str]:
    for section in variants.given(recipe.mixer, recipe.mixers, recipe.layers):
        if section.get("window", {}).get("name") == "full":
            yield (
                "mixer.window: 'full' keeps every key, and no process hands on all of them; leave such layers as the "
                "teacher's own softmax (layers: {keep: [...]}), whose keys are gathered"
            )
        if section.get("update", {}).get("shift_projections"):
            yield (
                "mixer.update.shift_projections: the token before the first of a process's own is another one's, and "
                "projections are not handed it; set it to false"
            )
