"""A checkpoint of ours, read for another layout: its body, its converted layers, and its softmax layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from linearize.errors import UnsupportedModelError
from linearize.export.layouts.body import Body, body_differences, body_of
from linearize.export.layouts.difference import Difference, Section
from linearize.export.layouts.layer import Given, Layer
from linearize.export.load import load
from linearize.export.plain import check_plain
from linearize.mixers import LayerShape, normalize
from linearize.surgery import attention_layers
from linearize.surgery.schema import shape_of, upgraded

ROLES = ("q", "k", "v", "o")


@dataclass
class Source:
    """What a layout is written from.

    Attributes:
        folder: of the checkpoint.
        body: the model around the layers.
        tensors: every tensor under its name.
        layers: converted layers with a recurrent branch or without one, by number.
        kept: the teacher's own softmax layers, by number.
    """

    folder: Path
    body: Body
    tensors: dict[str, Tensor]
    layers: dict[int, Layer] = field(default_factory=dict)
    kept: dict[int, LayerShape] = field(default_factory=dict)

    def projections(self, index: int) -> dict[str, Tensor]:
        """Weights of a layer's projections by role, and biases that are not zero."""
        found = {}
        for role in ROLES:
            place = f"model.layers.{index}.self_attn.{role}_proj"
            found[role] = self.tensors[f"{place}.weight"]
            bias = self.tensors.get(f"{place}.bias")
            if bias is not None and bias.any():
                found[f"{role}.bias"] = bias
        return found


def read(folder: Path, layout: str) -> Source:
    """Load a checkpoint and take it apart.

    Args:
        folder: an exported checkpoint.
        layout: what it is read for, for messages.

    Raises:
        CheckpointError: see `load` and `check_plain`.
        UnsupportedModelError: the model around the layers is not Llama's; the message lists what differs.
    """
    from linearize.export.load import check_folder

    _, config = check_folder(folder)
    check_plain(folder, config, f"the layout {layout} has no place for them")
    model: Any = load(folder)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    differences = body_differences(model.config, tensors)
    if differences:
        raise UnsupportedModelError(refused(folder, layout, "Llama's body", differences))
    source = Source(folder, body_of(model.config), tensors)
    plan = upgraded(model.config.linearize)
    sections: dict[str, Section] = {name: normalize(section) for name, section in plan["mixers"].items()}
    for layer in attention_layers(model):
        place = f"{layer.path}.mixer."
        if layer.path not in plan["layers"]:
            source.kept[layer.index] = layer.shape
            continue
        section = sections[plan["layers"][layer.path]["mixer"]]
        given = Given(section, shape_of(plan, layer.path), source.body.eps)
        parts = {name.removeprefix(place): value for name, value in tensors.items() if name.startswith(place)}
        source.layers[layer.index] = Layer(layer.index, given, source.projections(layer.index), parts)
    return source


def refused(folder: Path, layout: str, nearest: str, differences: list[Difference]) -> str:
    """The message of a layout that cannot hold a checkpoint."""
    listed = "\n".join(f"  - {difference}" for difference in dict.fromkeys(differences))
    return (
        f"{folder}: --layout {layout}: nothing there computes what this checkpoint does. Nearest is {nearest}; what "
        f"differs:\n{listed}\nThe table in docs/export.md has the recipes that can be written, and where any runs"
    )
