"""Compositions that the contract holds for: every registered part once, option variants, every recipe's mixer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from linearize.config import compose, list_recipes
from linearize.config.variants import sections
from linearize.mixers import PARTS, LayerShape, Mixer, build, check, normalize

SHAPES = {
    "grouped": LayerShape(
        heads=4, kv_heads=2, key_dim=8, value_dim=6, scaling=8**-0.5, model_dim=10, turns=(1.0, 0.1, 0.01, 0.001)
    ),
    "capped": LayerShape(
        heads=3, kv_heads=1, key_dim=8, value_dim=8, scaling=0.3, softcap=4.0, sliding_window=11, model_dim=10,
        turns=(1.0, 0.03),
    ),
}  # fmt: skip
SMALL = {"dim": 8, "size": 5, "rank": 3, "slots": 4, "within": 13}
"""Sizes that every part is shrunk to."""

HEDGEHOG = {"name": "hedgehog", "dim": 8}
SLIDING = {"name": "sliding", "size": 5}
PLAIN = {"feature_map": {"name": "identity"}, "normalizer": {"name": "none"}}
FIRST = {"first_values": True, "first_rank": 3}
SKELETONS: list[dict] = [
    {"feature_map": HEDGEHOG},
    {"feature_map": HEDGEHOG, "window": SLIDING},
    {"feature_map": HEDGEHOG, "gate": {"name": "low_rank", "rank": 3}},
    {"feature_map": HEDGEHOG, "normalizer": {"name": "none"}},
    {
        "feature_map": {"name": "softmax_dim"},
        "normalizer": {"name": "none"},
        "gate": {"name": "low_rank", "rank": 3},
    },
    {"feature_map": HEDGEHOG, "normalizer": {"name": "none"}, "gate": {"name": "mamba2"}},
    {
        "feature_map": {"name": "softmax_dim"},
        "normalizer": {"name": "none"},
        "gate": {"name": "key_pool"},
        "window": {**SLIDING, "overlap": True},
        "combine": {"name": "weighted"},
    },
    {
        "feature_map": {"name": "identity"},
        "normalizer": {"name": "none"},
        "gate": {"name": "kda", "rank": 3},
    },
    {"window": SLIDING},
]
"""What a part is put into: the first of these that it makes sense in."""

VARIANTS: list[dict] = [
    {"feature_map": {"name": "hedgehog", "dim": 5, "per": "kv_head"}, "window": SLIDING},
    {"feature_map": {"name": "hedgehog", "dim": 8, "tied": True, "space": "half"}},
    {
        "feature_map": {"name": "hedgehog", "dim": 8, "activation": "exp"},
        "window": {"name": "sliding", "size": 1},
    },
    {
        "feature_map": HEDGEHOG,
        "window": {"name": "sliding", "size": 20},
        "combine": {"name": "shared_normalizer", "complement": True, "stabilized": True},
    },
    {"feature_map": HEDGEHOG, "gate": {"name": "fixed", "slopes": "alibi"}},
    {"feature_map": HEDGEHOG, "gate": {"name": "fixed", "learned": True, "per": "kv_head"}},
    {"feature_map": {"name": "hedgehog", "dim": 8, "per": "kv_head"}, "gate": {"name": "mamba2"}},
    {"feature_map": HEDGEHOG, "position": {"name": "rope", "recurrent": False}},
    {"window": SLIDING, "position": {"name": "rope", "window": False}},
    {"window": {"name": "full", "log_base": 3.0}, "position": {"name": "rope", "window": False}},
    {"feature_map": HEDGEHOG, "window": {**SLIDING, "first": 3, "sinks": "learned", "within": 30}},
    {
        "feature_map": HEDGEHOG,
        "window": {**SLIDING, "first": 7, "overlap": True, "within": 1},
        "combine": {"name": "weighted"},
    },
    {"window": {**SLIDING, "first": 2}},
    {
        "feature_map": HEDGEHOG,
        "window": {"name": "terraced", "size": 8, "first": 3, "sinks": "learned", "within": 20},
    },
    {"feature_map": {"name": "cosformer"}, "window": {"name": "terraced", "size": 3}},
    {"window": {"name": "block", "size": 4, "first": 3, "sinks": "learned", "within": 25}},
    {"window": {"name": "block", "size": 6}},
    {
        "feature_map": HEDGEHOG,
        "window": {"name": "terraced", "size": 3, "overlap": True},
        "combine": {"name": "sigmoid", "per": "token"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "rwkv6", "rank": 3},
        "update": {"name": "rwkv6", "bonus": True},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": HEDGEHOG,
        "gate": {"name": "fixed"},
        "update": {"name": "rwkv6", "balanced": False, "bonus": True},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "rwkv6", "rank": 3, "per": "query_head"},
        "update": {"name": "delta"},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "key_pool"},
        "update": {"name": "delta"},
        "normalizer": {"name": "group_norm"},
        "window": {**SLIDING, "overlap": True},
        "combine": {"name": "weighted"},
    },
    {
        "short_conv": {"name": "depthwise", "roles": "qkv", "activation": "silu"},
        "feature_map": {"name": "identity", "l2_normalize": True},
        "gate": {"name": "mamba2"},
        "update": {"name": "delta", "bias": False, "rescales": False},
        "normalizer": {"name": "group_norm", "kind": "rms"},
    },
    {**PLAIN, "update": {"name": "delta_product", "rank": 3, "bias": False, "rescales": False}},
    {
        **PLAIN,
        "gate": {"name": "rwkv7", "rank": 3, "per": "query_head"},
        "update": {"name": "rwkv7", "rank": 3},
    },
    {
        "feature_map": {"name": "identity", "scaled": False},
        "gate": {"name": "rwkv7", "rank": 3},
        "update": {"name": "rwkv7", "rank": 3, "balanced": False},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "kda", "rank": 3, "per": "query_head", "lowest": -5.0},
        "update": {"name": "gdn2"},
        "normalizer": {"name": "none"},
        "output": {"name": "gated_norm", "rank": 3},
    },
    {"feature_map": HEDGEHOG, "window": SLIDING, "update": {"name": "additive", "start": True}},
    {
        "feature_map": HEDGEHOG,
        "gate": {"name": "low_rank", "rank": 3},
        "update": {"name": "additive", "start": True},
    },
    {
        "feature_map": HEDGEHOG,
        "gate": {"name": "fixed"},
        "update": {"name": "rwkv6", "bonus": True, "start": True},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "mamba2"},
        "update": {"name": "delta", "start": True},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "kda", "rank": 3},
        "update": {"name": "delta", "start": True},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "kda", "rank": 3},
        "update": {"name": "delta_product", "rank": 3, "steps": 3, "reflects": True, "start": True},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "kda", "rank": 3},
        "update": {"name": "gdn2", "start": True},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "rwkv7", "rank": 3},
        "update": {"name": "rwkv7", "rank": 3, "balanced": False, "start": True},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "softmax_dim"},
        "gate": {"name": "low_rank", "rank": 3},
        "update": {"name": "slots", "slots": 4, "start": True},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "softmax_dim"},
        "gate": {"name": "low_rank", "rank": 3},
        "update": {"name": "sse", "states": 3, "active": 2},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "mamba2"},
        "update": {"name": "sse", "states": 3},
        "normalizer": {"name": "group_norm"},
    },
    {
        "feature_map": {"name": "identity"},
        "update": {"name": "mesa", "steps": 16},
        "normalizer": {"name": "none"},
        "window": {**SLIDING, "overlap": True},
        "combine": {"name": "sum"},
    },
    {
        "feature_map": HEDGEHOG,
        "gate": {"name": "low_rank", "rank": 3},
        "update": {"name": "log_linear", "levels": 3, "block": 4},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "rwkv7", "rank": 3, "shift": True},
        "update": {"name": "rwkv7", "rank": 3, "shift": True, "shift_projections": True, **FIRST},
        "normalizer": {"name": "none"},
        "short_conv": {"name": "depthwise", "taps": 2},
        "output": {"name": "gate", "rank": 3, "shift": True},
    },
    {
        "feature_map": {"name": "exp", "learned": True},
        "update": {"name": "latte"},
        "normalizer": {"name": "none"},
        "window": {**SLIDING, "overlap": True},
        "combine": {"name": "sum"},
    },
    {
        "feature_map": {"name": "identity"},
        "update": {"name": "inline", "averaged": False},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "scalar", "per": "kv_head"},
        "update": {"name": "mlstm", "start": True},
        "normalizer": {"name": "bounded"},
        "window": {**SLIDING, "overlap": True},
        "combine": {"name": "sigmoid"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "mamba2"},
        "update": {"name": "log_linear", "levels": 2},
        "normalizer": {"name": "none"},
    },
    {
        "feature_map": {"name": "identity"},
        "gate": {"name": "kda", "rank": 3},
        "update": {"name": "log_linear_delta", "levels": 4, "block": 2},
        "normalizer": {"name": "none"},
        "window": {**SLIDING, "overlap": True},
        "combine": {"name": "sum"},
    },
    {
        "feature_map": HEDGEHOG,
        "window": {**SLIDING, "overlap": True},
        "position": {"name": "selective_rope", "rank": 3, "width": 4, "recurrent": False},
    },
    {
        "feature_map": {"name": "taylor", "dim": 8, "per": "kv_head"},
        "position": {"name": "selective_rope", "rank": 3},
    },
    {"feature_map": HEDGEHOG, "window": SLIDING, "output": {"name": "gated_norm", "rank": 3, "shift": True}},
]
"""Options that change shapes or paths."""


@cache
def registered() -> tuple[dict, ...]:
    """Distinct compositions, each checked."""
    found = [
        *SKELETONS,
        *(_with(part, name) for part, (registry, _) in PARTS.items() for name in registry.names()),
    ]
    shipped = [compose(name) for name, _ in list_recipes()]
    found += VARIANTS
    found += [small(mixer) for recipe in shipped for mixer in sections(recipe.mixer, recipe.mixers).values()]
    distinct = {label(mixer): mixer for mixer in found}
    for mixer in distinct.values():
        assert check(mixer) == [], (mixer, check(mixer))
    return tuple(distinct.values())


def _with(part: str, name: str) -> dict:
    registry = PARTS[part][0]
    fields = registry.get(name).Config.__dataclass_fields__
    choice = {"name": name, **{key: value for key, value in SMALL.items() if key in fields}}
    for skeleton in SKELETONS:
        mixer = {**skeleton, part: choice}
        if not check(mixer) and not _idle(mixer, part):
            return mixer
    for skeleton in SKELETONS:  # a window of which nothing is handed on
        mixer = {key: value for key, value in skeleton.items() if key not in ("feature_map", "gate")} | {
            part: choice
        }
        if not check(mixer):
            return mixer
    raise AssertionError(f"no skeleton takes {part} '{name}'; add one to tests/compositions.py")


def _idle(mixer: dict, part: str) -> bool:
    return part == "combine" and build(mixer, SHAPES["grouped"]).combine is None


def small(mixer: dict) -> dict:
    """The composition with its sizes shrunk."""
    shrunk = {}
    for part, options in normalize(mixer).items():
        shrunk[part] = {
            key: SMALL[key] if key in SMALL and value else value for key, value in options.items()
        }
    return shrunk


def label(mixer: dict) -> str:
    """A readable id: what differs from the defaults."""
    default = normalize({})
    parts = []
    for part, options in normalize(mixer).items():
        changed = [str(value) for key, value in options.items() if default[part].get(key) != value]
        if changed:
            parts.append("_".join(changed))
    return "-".join(parts)


@dataclass
class Draw:
    """Random inputs of one call, which cut along the tokens together.

    Attributes:
        q, k, v: [B, T, H, K], [B, T, N, K], [B, T, N, V].
        hidden: [B, T, D].
        plain: q and k before RoPE, unrelated random numbers here.
        first: [B, T, N, V], the first converted layer's values.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    plain: tuple[Tensor, Tensor]
    first: Tensor

    @classmethod
    def of(cls, shape: LayerShape, tokens: int, dtype: torch.dtype, batch: int = 2, seed: int = 0) -> Draw:
        """Standard normal draws, queries a little larger, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(batch, tokens, *size, generator=generator, dtype=torch.float64).to(dtype)

        def queries() -> Tensor:
            return (1.5 * draw(shape.heads, shape.key_dim)).to(dtype)

        q, k, v = queries(), draw(shape.kv_heads, shape.key_dim), draw(shape.kv_heads, shape.value_dim)
        hidden, plain = draw(shape.model_dim or 1), (queries(), draw(shape.kv_heads, shape.key_dim))
        return cls(q, k, v, hidden, plain, draw(shape.kv_heads, shape.value_dim))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.hidden, *self.plain, self.first]

    @staticmethod
    def _of(tensors: Iterable[Tensor]) -> Draw:
        q, k, v, hidden, plain_q, plain_k, first = tensors
        return Draw(q, k, v, hidden, (plain_q, plain_k), first)

    def apply(self, function) -> Draw:
        """The same with `function` on every tensor."""
        return self._of(function(x) for x in self.tensors)

    def __getitem__(self, tokens: slice) -> Draw:
        return self.apply(lambda x: x[:, tokens])

    def join(self, other: Draw) -> Draw:
        """`other` after this along the tokens."""
        return self._of(torch.cat(pair, 1) for pair in zip(self.tensors, other.tensors, strict=True))

    def run(self, form, **masks):
        """Call one of a mixer's forms."""
        context = {"hidden": self.hidden, "plain": self.plain, "first": self.first}
        return form(self.q, self.k, self.v, **context, **masks)


def make(mixer: dict, shape: LayerShape, dtype: torch.dtype) -> Mixer:
    """The mixer with random parameters."""
    torch.manual_seed(0)
    made = build(mixer, shape)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.to(dtype)
