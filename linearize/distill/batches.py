"""A stage's batches: each a function of its step, so that a resumed run goes on with the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from linearize.config.course import Course
from linearize.config.schedule import Over
from linearize.config.schema import StageConfig
from linearize.data.echo import Echoed
from linearize.data.packing import IGNORED
from linearize.errors import RecipeError


class Batches(Dataset):
    """All sequences of each optimizer step, from a data set that is read in order and reshuffled on every further pass.

    Where a stage's length changes, sequences are packed into its longest and cut where a step takes shorter ones; a
    phase begins with a whole sequence. Passages come again within what was cut, not from outside of it.

    Args:
        dataset: sequences, each a dictionary of tensors [T] or scalars; those that are cut are packed ones.
        course: the stage's steps.
        seed: of the further passes.
        shares: groups of processes that take a part of each step.
        size: processes of a group, which take the same; item `step * shares * size + rank` is that of one of them.
    """

    def __init__(self, dataset: Any, course: Course, seed: int, shares: int = 1, size: int = 1) -> None:
        self.dataset = dataset
        self.shares, self.size = shares, size
        self.course = course
        self.seed = seed
        self._orders: dict[int, list[int]] = {}
        self._firsts = firsts(course)

    def __len__(self) -> int:
        return self.course.steps * self.shares * self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Tensors [B, T] of a step's batch, or of a process's part of it."""
        step, share = divmod(index // self.size, self.shares)
        phase = self.course.phase(step)
        first = self._firsts[self.course.phases.index(phase)]
        pieces = self.course.longest // phase.length
        items = []
        for place in part(phase.batch, share, self.shares):
            number = (step - phase.first) * phase.batch + place
            index = self._place(first + number // pieces)
            items.append(
                self.dataset[index] if pieces == 1 else self._piece(index, number % pieces, phase.length)
            )
        return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}

    def _place(self, index: int) -> int:
        turn, place = divmod(index, len(self.dataset))
        if turn == 0:
            return place
        if turn not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + turn)
            self._orders = {turn: torch.randperm(len(self.dataset), generator=generator).tolist()}
        return self._orders[turn][place]

    def _piece(self, index: int, number: int, length: int) -> dict[str, Tensor]:
        if isinstance(self.dataset, Echoed):
            return self.dataset.again(
                cut(self.dataset.dataset[index], number * length, length), index, number
            )
        return cut(self.dataset[index], number * length, length)


def part(batch: int, share: int, shares: int) -> range:
    """Which of a step's sequences are a process's own: one after the other, as many for each as can be."""
    return range(batch * share // shares, batch * (share + 1) // shares)


def check_parts(stages: Mapping[str, StageConfig], shares: int, *, alike: bool = False) -> None:
    """Refuse more processes than a step has sequences.

    Args:
        stages: of the recipe.
        shares: processes, or groups of them that hold sequences together.
        alike: whether each has to have as many, as they do where they gather weights for each other in every pass.

    Raises:
        RecipeError: names the stages.
    """
    least = {name: min(Over.of(stage.batch_size).values) for name, stage in stages.items()}
    problems = [
        f"stages.{name}.batch_size: a step of {batch} sequences cannot be shared by {shares} processes: start at most "
        f"{batch}, or make it larger"
        for name, batch in least.items()
        if batch < shares
    ]
    problems += [
        f"stages.{name}.batch_size: {batch} sequences are not as many for each of {shares} processes, and with "
        f"run.shard all compute in step: take a multiple of {shares}, or run.shard=none"
        for name, stage in stages.items()
        for batch in sorted(set(Over.of(stage.batch_size).values))
        if alike and batch >= shares and batch % shares
    ]
    if problems:
        raise RecipeError(problems)


def firsts(course: Course) -> list[int]:
    """Number of the packed sequence that each phase begins with, and behind them how many there are in all."""
    found = [0]
    for phase in course.phases:
        found.append(found[-1] - (-phase.steps * phase.step_tokens // course.longest))
    return found


def cut(item: dict[str, Tensor], first: int, length: int) -> dict[str, Tensor]:
    """A stretch of a packed sequence as a sequence of its own: nothing comes before its first token.

    Args:
        item: input_ids, position_ids, labels, each [T].
        first: token that it begins with.
        length: tokens.
    """
    piece = {key: value[first : first + length] for key, value in item.items()}
    positions, labels = piece["position_ids"].clone(), piece["labels"].clone()
    begins = (positions == 0).nonzero()
    own = int(begins[0]) if len(begins) else length
    positions[:own] -= positions[0].clone()
    labels[0] = IGNORED
    return {**piece, "position_ids": positions, "labels": labels}


def only(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A step's batch, which is one item of `Batches`."""
    [batch] = items
    return batch
