"""The protocols of an objective and the registry that holds them.

Legend (see mixers/base.py): B batch, T tokens, H query heads, V value dim or vocabulary, R query rows of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from linearize.errors import RecipeError
from linearize.registry import Registry

Level = Literal["layer", "model", "pair"]
OBJECTIVES: Registry[Any] = Registry("objective")


class Call(Protocol):
    """What a layer objective reads of `surgery.LayerCall`: one converted layer on one batch."""

    valid: Tensor | None
    """[B, T] bool, false at padding; None when every position counts."""
    q: Tensor
    """[B, T, H, K] queries after RoPE, detached."""
    k: Tensor
    """[B, T, Hkv, K]."""
    teacher: Tensor
    """[B, T, H, V] the original attention's output before o_proj, detached."""

    def student(self) -> Tensor:
        """[B, T, H, V] the mixer's output, with gradient to the mixer's parameters."""

    def project(self, y: Tensor) -> Tensor:
        """[B, T, H, V] -> [B, T, D] through the layer's frozen o_proj."""

    def weights(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Attention weights (teacher, student), each [B, H, R, T] float32, of a slice of query rows: the definition."""


def take_gradient(loss: Tensor) -> None:
    """Backward pass of a layer's loss; nothing where no parameter of the layer has a part in it (a window alone)."""
    if loss.requires_grad:
        torch.autograd.backward(loss)


class LayerObjective:
    """Compares student and teacher inside one layer; subclass `OutputObjective` or `BlockObjective`."""

    name: ClassVar[str] = ""
    level: ClassVar[Level] = "layer"
    projects: ClassVar[bool] = False
    """Whether it calls `Call.project`, so that every layer must have one output projection."""


class OutputObjective(LayerObjective, ABC):
    """A function of the student's output. All of a layer's share one forward pass and one backward pass."""

    @abstractmethod
    def loss(self, call: Call, student: Tensor) -> Tensor:
        """The scalar loss, mean over the valid positions.

        Args:
            call: the layer's tensors.
            student: [B, T, H, V] `call.student()`, in the compute dtype.
        """


class BlockObjective(LayerObjective, ABC):
    """A loss too large to hold at once: takes its gradient term by term, so that memory stays O(T)."""

    @abstractmethod
    def backward(self, call: Call, scale: float) -> Tensor:
        """Add the gradient of ``scale * loss`` to the mixer's parameters.

        Returns:
            The scalar loss without `scale`, detached.
        """


class TokenObjective(ABC):
    """Compares two rows of logits, token by token; the caller feeds it slices of tokens in float32."""

    name: ClassVar[str] = ""
    level: ClassVar[Level] = "model"
    needs_teacher: ClassVar[bool] = False

    @abstractmethod
    def tokens(self, student: Tensor, teacher: Any, targets: Tensor) -> Tensor:
        """Loss of each token.

        Args:
            student: [N, V] logits, float32 or wider.
            teacher: [N, V] logits of the teacher, or their `TopK`; None unless `needs_teacher`.
            targets: [N] int64 next token, -100 where there is none.

        Returns:
            [N]; entries at targets of -100 are ignored.
        """


class PairObjective(ABC):
    """Compares two answers to one prompt by what the student and the teacher give them."""

    name: ClassVar[str] = ""
    level: ClassVar[Level] = "pair"
    needs_teacher: ClassVar[bool] = True

    @abstractmethod
    def pairs(self, margin: Tensor, beta: float) -> Tensor:
        """Loss [N] of each pair.

        Args:
            margin: [N] ``log p(chosen) - log p(rejected)`` of the student, less that of the teacher.
            beta: how strongly the student is held to the teacher.
        """


def names(level: Level | None = None) -> list[str]:
    """Registered objectives, sorted; of one level when it is given."""
    return [name for name in OBJECTIVES.names() if level is None or OBJECTIVES.get(name).level == level]


def level_of(objective: Iterable[str]) -> Level:
    """The level that all the named objectives share.

    Raises:
        RecipeError: none is named, one is unknown, or two levels are mixed.
    """
    chosen = list(objective)
    if not chosen:
        raise RecipeError([f"objective: a stage needs at least one of {', '.join(names())}"])
    levels = {name: OBJECTIVES.get(name).level for name in chosen}
    if len(set(levels.values())) > 1:
        listed = ", ".join(f"{name} ({level})" for name, level in levels.items())
        raise RecipeError([f"objective: {listed}: a stage holds objectives of one level; use two stages"])
    return next(iter(levels.values()))
