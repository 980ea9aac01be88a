"""Which layers a recipe converts, and what that costs and saves, before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from linearize.config import variants
from linearize.config.layers import assign, idle
from linearize.config.names import DEFAULT, SOFTMAX
from linearize.config.words import describe
from linearize.errors import LinearizeError, RecipeError, collected, raise_together
from linearize.mixers import build, check, normalize
from linearize.surgery import demands
from linearize.surgery.inspection import AttentionLayer, attention_layers, skeleton
from linearize.surgery.model import refuse_converted
from linearize.surgery.others import other_layers
from linearize.surgery.projections import outputs, targets

log = logging.getLogger(__name__)


def select(layers: Any, indices: list[int], names: Iterable[str] = ()) -> list[int]:
    """Layer numbers that a recipe's `layers:` converts, into whichever mixer; see `config.layers.assign`.

    Args:
        layers: the recipe's value.
        indices: numbers of the model's attention layers.
        names: of the recipe's `mixers:`.

    Raises:
        RecipeError: a form that does not exist, a layer that the model does not have, or nothing left to convert.
    """
    given = assign(layers, indices, list(names))
    return [index for index, name in given.items() if name != SOFTMAX]


def checked(mixer: Mapping[str, Any], mixers: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Name -> the normalized section of each mixer of a recipe.

    Args:
        mixer, mixers: the recipe's sections.

    Raises:
        RecipeError: with every problem of `mixer`, or, where there is none, of the others.
    """
    problems = [*check(dict(mixer)), *variants.form_problems(mixers or {})]
    whole = {} if problems else variants.sections(mixer, mixers)
    for name in mixers or () if whole else ():
        problems += [f"mixers.{name}{problem.removeprefix('mixer')}" for problem in check(whole[name])]
    if problems:
        raise RecipeError(problems, where="mixer")
    return {name: normalize(section) for name, section in whole.items()}


@dataclass
class Row:
    """One attention layer of a plan; state and cache in bytes of a model in bfloat16.

    Attributes:
        kind: mixer, or softmax where the layer stays as it is.
        kv_window: tokens that the teacher's own layer keeps at most, or None where its cache grows without end.
        mixer: name of the mixer that the layer gets, or None.
        grows: its state does so, as the teacher's cache (window `full`).
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
    mixer: str | None = None
    grows: bool = False

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
        mixers: name -> normalized section of each mixer that a layer gets.
        others: path -> class of the layers that hold no attention and stay as they are.
    """

    rows: list[Row]
    others: dict[str, str] = field(default_factory=dict)
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def converted(self) -> list[Row]:
        return [row for row in self.rows if row.kind == "mixer"]

    @property
    def shrinking(self) -> list[Row]:
        """Converted layers whose state has one size, whatever the length."""
        return [row for row in self.converted if not row.grows]

    @property
    def parameters(self) -> int:
        """Parameters added."""
        return sum(row.parameters for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """State of one sequence in the converted layers, constant in its length."""
        return sum(row.state_bytes for row in self.shrinking)

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token adds to the teacher's KV cache in the layers that no longer grow, as long as none is full."""
        return sum(row.kv_bytes_per_token for row in self.shrinking)

    @property
    def break_even(self) -> int | None:
        """Tokens from which the states are smaller than the KV caches that they replace, or None: never."""
        return _break_even(self.shrinking)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, and each mixer in words, for plan.json."""
        names = ("parameters", "state_bytes", "kv_bytes_per_token", "break_even")
        rows = [asdict(row) for row in self.rows]
        words = {name: describe(section) for name, section in self.mixers.items()}
        totals = {name: getattr(self, name) for name in names}
        return {"layers": rows, "mixers": words, "others": self.others, **totals}


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


def row(layer: AttentionLayer, mixer: dict[str, Any] | None, name: str = DEFAULT) -> Row:
    """One layer's row; `mixer`, which is called `name`, None for a layer that stays softmax."""
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
        mixer=None if built is None else name,
        grows=built is not None and not built.has_fixed_state,
    )


def plan(
    teacher: PreTrainedConfig | PreTrainedModel,
    mixer: dict[str, Any],
    layers: Any = "all",
    roles: Iterable[str] = (),
    projects: bool = False,
    errors: list[LinearizeError] | None = None,
    mixers: Mapping[str, Any] | None = None,
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
        mixers: a recipe's `mixers:` section.

    Raises:
        UnsupportedModelError: see `attention_layers` and `demands`; a projection that is asked for is not there.
        RecipeError: see `select`; or several of these.
        LinearizeError: the model is converted already.
    """
    model = teacher if isinstance(teacher, PreTrainedModel) else skeleton(teacher)
    refuse_converted(model)
    found = attention_layers(model)
    wrong: list[LinearizeError] = [] if errors is None else errors
    whole = checked(mixer, mixers)
    given = dict.fromkeys((layer.index for layer in found), DEFAULT)
    with collected(wrong):
        given = assign(layers, list(given), list(mixers or {}))
    if next(model.parameters()).is_meta:  # a run plans again on loaded weights, and says it once
        for sentence in idle(layers, len(found), list(mixers or {})):
            log.warning("%s", sentence)
    chosen = [layer for layer in found if given[layer.index] != SOFTMAX]
    converted = [(layer.path, layer.module, layer.shape) for layer in chosen]
    demands.check(model, [(layer, whole[given[layer.index]]) for layer in chosen], wrong)
    with collected(wrong):
        targets(model, converted, roles)
    if projects:
        with collected(wrong):
            outputs(converted)
    if errors is None:
        raise_together(wrong, "recipe and model")
    rows = [row(layer, whole.get(given[layer.index]), given[layer.index]) for layer in found]
    used = {name: section for name, section in whole.items() if name in given.values()}
    return Plan(rows, other_layers(model, [layer.path for layer in found]), used)
