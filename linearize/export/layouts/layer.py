"""A layer of another library, and a converted layer as it is handed to one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from linearize.export.layouts.difference import Difference, Section
from linearize.mixers import LayerShape


@dataclass
class Given:
    """What decides whether a layer can be written in a foreign layout; no weights.

    Attributes:
        mixer: the normalized section.
        shape: the layer's numbers.
        eps: epsilon of the model's own norms, which foreign layers share.
    """

    mixer: Section
    shape: LayerShape
    eps: float


@dataclass
class Layer:
    """A converted layer.

    Attributes:
        index: its number in the model.
        given: its composition.
        weights: [out, in] of the projections q, k, v and o; biases as `q.bias`, where they are not zero.
        parts: the mixer's parameters under their names in it (`recurrent.gate.down`).
    """

    index: int
    given: Given
    weights: dict[str, Tensor]
    parts: dict[str, Tensor]


class ForeignLayer:
    """Base of the layers that a conversion may be equal to.

    Attributes:
        name: in messages and tables.
        model: what the library's config calls the model around it (`model_type`, or a GGUF architecture).
        biases: roles whose projections may have one.
        shifts_output: whether its output gate reads tokens mixed with those before them.
    """

    name: ClassVar[str]
    model: ClassVar[str]
    biases: ClassVar[frozenset[str]] = frozenset()
    shifts_output: ClassVar[bool] = False

    def differences(self, given: Given) -> Iterator[Difference]:
        """Everything in which the mixer is not this layer; none: they are the same function."""
        raise NotImplementedError(type(self))  # pragma: no cover - every layer defines it

    def found(self, layer: Layer) -> Iterator[Difference]:
        """What differs by the values of the weights alone."""
        for role in ("q", "k", "v", "o"):
            if f"{role}.bias" in layer.weights and role not in self.biases:
                yield Difference("body", f"a bias on the {role} projection", "none")

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """The layer's tensors under the library's names for them, inside the layer."""
        raise NotImplementedError(type(self))  # pragma: no cover - every layer that can be met defines it

    def settings(self, given: Given) -> dict[str, Any]:
        """Entries of the foreign config that follow from the layer; equal for all layers of a model."""
        raise NotImplementedError(type(self))  # pragma: no cover
