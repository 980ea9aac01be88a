"""Which layers a recipe converts, and what that costs and saves, before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from linearize.errors import LinearizeError, RecipeError, collected, raise_together
from linearize.mixers import build
from linearize.surgery.inspection import AttentionLayer, attention_layers, skeleton
from linearize.surgery.others import other_layers
from linearize.surgery.projections import outputs, targets

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
    """One attention layer of a plan; state and cache in bytes of a model in bfloat16.

    Attributes:
        kv_window: tokens that the teacher's own layer keeps at most, or None where its cache grows without end.
    """

    layer: int
    path: str
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    state_bytes: int
    kv_bytes_per_token: int
    kv_window: int | None = None

    def kv_bytes(self, length: int) -> int:
        """The teacher's cache of `length` tokens in this layer."""
        kept = length if self.kv_window is None else min(length, self.kv_window)
        return kept * self.kv_bytes_per_token

    @property
    def break_even(self) -> int | None:
        """Tokens from which the state is smaller than the teacher's cache, or None where that is never so."""
        return _break_even([self])


@dataclass
class Plan:
    """What a conversion does to each layer.

    Attributes:
        rows: the attention layers.
        others: path -> class of the layers that hold no attention and stay as they are.
    """

    rows: list[Row]
    others: dict[str, str] = field(default_factory=dict)

    @property
    def converted(self) -> list[Row]:
        return [row for row in self.rows if row.kind == "mixer"]

    @property
    def parameters(self) -> int:
        """Parameters added."""
        return sum(row.parameters for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """State of one sequence in the converted layers, constant in its length."""
        return sum(row.state_bytes for row in self.converted)

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token adds to the teacher's KV cache in the layers that are converted, as long as none is full."""
        return sum(row.kv_bytes_per_token for row in self.converted)

    @property
    def break_even(self) -> int | None:
        """Tokens from which the states are smaller than the KV caches that they replace, or None: never."""
        return _break_even(self.converted)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for plan.json."""
        names = ("parameters", "state_bytes", "kv_bytes_per_token", "break_even")
        rows = [asdict(row) for row in self.rows]
        return {"layers": rows, "others": self.others, **{name: getattr(self, name) for name in names}}


def _break_even(rows: list[Row]) -> int | None:
    """Smallest length at which the rows' caches take as much as their states."""
    state, length, filled = sum(row.state_bytes for row in rows), 0, 0
    growing = sum(row.kv_bytes_per_token for row in rows)
    for row in sorted((row for row in rows if row.kv_window is not None), key=lambda row: row.kv_window or 0):
        window = row.kv_window or 0
        if filled + growing * (window - length) >= state:
            break
        filled += growing * (window - length)
        length, growing = window, growing - row.kv_bytes_per_token
    if filled >= state:
        return length
    return length - (filled - state) // growing if growing else None


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
        kv_window=shape.sliding_window or shape.chunk,
    )


def plan(
    teacher: PreTrainedConfig | PreTrainedModel,
    mixer: dict[str, Any],
    layers: Any = "all",
    roles: Iterable[str] = (),
    projects: bool = False,
    errors: list[LinearizeError] | None = None,
) -> Plan:
    """What a conversion would do.

    Args:
        teacher: a config, for which no weights are loaded, or a loaded model.
        mixer: a recipe's `mixer:` section.
        layers: a recipe's `layers:` value.
        roles: projections (q, k, v, o) that adapters will be hung on.
        projects: whether training will look through each layer's output projection.
        errors: receives what `select` and the projections are refused for, in place of raising it; the plan is then
            that of all layers.

    Raises:
        UnsupportedModelError: see `attention_layers`; a projection that is asked for is not there.
        RecipeError: see `select`; or several of these.
    """
    model = teacher if isinstance(teacher, PreTrainedModel) else skeleton(teacher)
    found = attention_layers(model)
    wrong: list[LinearizeError] = [] if errors is None else errors
    chosen = [layer.index for layer in found]
    with collected(wrong):
        chosen = select(layers, chosen)
    ahead = next(model.parameters()).is_meta  # a run plans again on loaded weights, and says it once
    if ahead and isinstance(layers, dict) and layers.get("every", 0) > len(found):
        log.warning(
            "layers.every: %s, but the model has %s attention layers, so none stays softmax",
            layers["every"],
            len(found),
        )
    converted = [(layer.path, layer.module, layer.shape) for layer in found if layer.index in chosen]
    with collected(wrong):
        targets(model, converted, roles)
    if projects:
        with collected(wrong):
            outputs(converted)
    if errors is None:
        raise_together(wrong, "recipe and model")
    rows = [row(layer, mixer if layer.index in chosen else None) for layer in found]
    return Plan(rows, other_layers(model, [layer.path for layer in found]))
