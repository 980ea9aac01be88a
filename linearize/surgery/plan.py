"""Which layers a recipe converts, and what that costs and saves, before any weight is loaded."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from linearize.errors import RecipeError
from linearize.mixers import build
from linearize.surgery.inspection import AttentionLayer, attention_layers, skeleton

log = logging.getLogger(__name__)


def select(layers: Any, indices: list[int]) -> list[int]:
    """Layer numbers that a recipe's `layers:` converts.

    Args:
        layers: ``all``, ``{every: n}`` (the n-th, 2n-th, ... stay softmax), a list, or ``{keep: [...]}``.
        indices: numbers of the model's attention layers.

    Raises:
        RecipeError: a form that does not exist, a layer that the model does not have, or nothing left to convert.
    """
    if layers == "all":
        chosen = list(indices)
    elif isinstance(layers, dict) and set(layers) == {"every"} and _is_positive(layers["every"]):
        if layers["every"] > len(indices):
            log.warning(
                "layers.every: %s, but the model has %s attention layers, so none stays softmax",
                layers["every"],
                len(indices),
            )
        chosen = [index for place, index in enumerate(indices, start=1) if place % layers["every"]]
    else:
        keep = isinstance(layers, dict) and set(layers) == {"keep"}
        named = layers["keep"] if keep else layers
        if not isinstance(named, (list, tuple)) or not all(isinstance(index, int) for index in named):
            forms = "all, {every: n}, [0, 2, 5], {keep: [7, 15]}"
            raise RecipeError([f"layers: {layers!r} is none of {forms}"])
        missing = [index for index in named if index not in indices]
        if missing:
            found = f"its layers are {indices[0]} to {indices[-1]}"
            raise RecipeError([f"layers: the model has no attention layer {missing[0]}; {found}"])
        chosen = [index for index in indices if (index in named) != keep]
    if not chosen:
        raise RecipeError([f"layers: {layers!r} leaves no layer to convert"])
    return chosen


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


@dataclass
class Row:
    """One attention layer of a plan; state and cache in bytes of a model in bfloat16."""

    layer: int
    path: str
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    state_bytes: int
    kv_bytes_per_token: int


@dataclass
class Plan:
    """What a conversion does to each layer."""

    rows: list[Row]

    @property
    def parameters(self) -> int:
        """Parameters added."""
        return sum(row.parameters for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """State of one sequence in the converted layers, constant in its length."""
        return sum(row.state_bytes for row in self.rows if row.kind == "mixer")

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token adds to the teacher's KV cache in the layers that are converted."""
        return sum(row.kv_bytes_per_token for row in self.rows if row.kind == "mixer")

    @property
    def break_even(self) -> int:
        """Context length in tokens from which the state is smaller than the KV cache that it replaces."""
        return -(-self.state_bytes // max(self.kv_bytes_per_token, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for plan.json."""
        names = ("parameters", "state_bytes", "kv_bytes_per_token", "break_even")
        return {"layers": [asdict(row) for row in self.rows], **{name: getattr(self, name) for name in names}}


def row(layer: AttentionLayer, mixer: dict[str, Any] | None) -> Row:
    """One layer's row; `mixer` None for a layer that stays softmax."""
    shape = layer.shape
    with torch.device("meta"):
        built = build(mixer, shape) if mixer is not None else None
    return Row(
        layer=layer.index,
        path=layer.path,
        kind="softmax" if built is None else "mixer",
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.key_dim,
        parameters=built.added_parameters if built else 0,
        state_bytes=built.state_bytes() if built else 0,
        kv_bytes_per_token=2 * shape.kv_heads * (shape.key_dim + shape.value_dim),
    )


def plan(config: PreTrainedConfig, mixer: dict[str, Any], layers: Any = "all") -> Plan:
    """What converting a model of this config would do; loads no weights.

    Raises:
        UnsupportedModelError: see `attention_layers`.
        RecipeError: see `select`.
    """
    found = attention_layers(skeleton(config))
    chosen = select(layers, [layer.index for layer in found])
    return Plan([row(layer, mixer if layer.index in chosen else None) for layer in found])
