"""The first converted layer's values on their way to the layers that mix theirs with them (RWKV-7's value residual).

They travel within one call of the model, in an object that its base model makes and every block hands to its attention
under `NAME`, beside the arguments of transformers. So calls do not meet, however they are interleaved, and what
activation checkpointing runs again finds the values of its own call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.errors import UnsupportedModelError
from linearize.mixers import LayerShape

NAME = "linearize_first_values"
"""Of the argument."""
OPTION = "mixer.update.first_values"


class FirstLayer:
    """What the first converted layer leaves for the others in one call of the model.

    Attributes:
        values: [B, T, N, V], or None before that layer has run.
        graph: whether gradients were recorded when it ran.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.graph = False

    def put(self, values: Tensor) -> None:
        """From the first converted layer, in whatever mode it runs."""
        self.values, self.graph = values, torch.is_grad_enabled()

    def taken(self, like: Tensor, layer: Any) -> Tensor:
        """The values on the device of the layer's own.

        Args:
            like: the layer's own values [B, T, N, V].
            layer: the converted module; only messages look at its number, or each block would be compiled by itself.

        Raises:
            UnsupportedModelError: the first layer has not run in this call, or it ran without a graph.
        """
        if self.values is None:
            raise UnsupportedModelError(
                f"{layer.named()}: mixes its values with those of the first converted layer, which has not run before "
                f"it in this call; run the model as a whole, or convert with {OPTION}=false"
            )
        if torch.is_grad_enabled() and not self.graph:
            raise UnsupportedModelError(
                f"{layer.named()}: mixes its values with those of the first converted layer, which ran without "
                "gradients, as under reentrant checkpointing; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return self.values.to(like.device)


def missing(where: str) -> UnsupportedModelError:
    """The layer was called without the object."""
    return UnsupportedModelError(
        f"{where}: mixes its values with those of the first converted layer, but was called without `{NAME}`: the "
        "family's blocks do not hand keyword arguments on to their attention, or the layer was called alone; convert "
        f"with {OPTION}=false"
    )


def mark(layers: list[Any]) -> None:
    """Tell converted layers which of them is the first that mixes values: its values are the others'.

    Args:
        layers: converted attention modules, in layer order.

    Raises:
        UnsupportedModelError: a layer that mixes has values of another shape.
    """
    mixing = [layer for layer in layers if layer.mixer.uses_first]
    for layer in layers:
        layer.linearize_hands = bool(mixing) and layer is mixing[0]
    check([(f"layer {layer.layer_idx} ({type(layer).__name__})", layer.mixer.shape) for layer in mixing])


def check(mixing: list[tuple[str, LayerShape]]) -> None:
    """Refuse layers that mix values of another shape than the first one's.

    Args:
        mixing: name and numbers of the layers that do, in their order.

    Raises:
        UnsupportedModelError: names the first such layer.
    """
    for name, own in mixing:
        first_name, first = mixing[0]
        if (first.kv_heads, first.value_dim) != (own.kv_heads, own.value_dim):
            raise UnsupportedModelError(
                f"{name} has {own.kv_heads} heads of {own.value_dim} values, {first_name} {first.kv_heads} of "
                f"{first.value_dim}: they cannot be mixed; convert with {OPTION}=false, or give such layers a mixer of "
                "their own"
            )
