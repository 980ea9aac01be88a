"""A text that has been read once, as what decoding needs behind it: the state of every layer, to go on from many times.

A linear-attention layer's state has one size whatever the length of the text; kept softmax layers bring their keys and
values along. A prefix is read through transformers' own cache, and goes on in one or, repeated, in the buffers of a
`Decoder`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from linearize.decode.arguments import cache_name, evaluating, forward_names
from linearize.decode.identity import check_identity, identity
from linearize.decode.reach import check_reach
from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.mixers import State
from linearize.mixers.offloaded import device_of
from linearize.surgery import converted
from linearize.surgery.cache import LinearizedCacheLayer, adopt

KEYS = ("keys", "values")
"""What a softmax layer holds, each [1, N, S, K]."""


@dataclass(frozen=True)
class Prefix:
    """What a model holds of one text; `read_ids` makes it, `save_state` and `load_state` keep it in a file.

    Attributes:
        tensors: of every layer, "3.sums" being `sums` of layer 3, each with one row; never written.
        tokens: number of tokens read.
        last: the last of them.
        digest: of their ids in order, see `begins`.
        identity: of model and tokenizer, see `linearize.decode.identity`.
    """

    tensors: dict[str, Tensor]
    tokens: int
    last: int
    digest: str
    identity: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def grown(self) -> int:
        """Those of them that grow with the text: keys and values of layers that attend to all of it."""
        names = (*KEYS, "window_k", "window_v", "window_valid")
        grown = [x for name, x in self.tensors.items() if _split(name)[1] in names and self._grows(name)]
        return sum(tensor.numel() * tensor.element_size() for tensor in grown)

    def _grows(self, name: str) -> bool:
        index, held = _split(name)
        # a ring has a counter beside its keys, and its size is fixed
        return held in KEYS or f"{index}.window_next" not in self.tensors

    def layer(self, index: int) -> dict[str, Tensor]:
        """What layer `index` holds, by name."""
        return {held: x for name, x in self.tensors.items() for at, held in [_split(name)] if at == index}

    def begins(self, ids: Sequence[int] | Tensor) -> bool:
        """Whether a text, as ids, begins with the one that was read."""
        first = _row(ids)[: self.tokens]
        return len(first) == self.tokens and _digest(first) == self.digest

    def check(self, model: Any, tokenizer: Any = None) -> None:
        """Refuse another model than the one that read the text; its weights are summed up for that.

        Raises:
            LinearizeError: names what differs.
        """
        check_identity(self.identity, identity(model, tokenizer))

    def cache(self, model: Any, rows: int = 1) -> Cache:
        """A new cache of transformers in which each of so many rows has read the text.

        Pass it to `model.generate` with the ids of the whole text and what follows, or to `forward` with what follows.

        Args:
            model: the one that read it, converted layers as students.
            rows: of the batch.

        Raises:
            LinearizeError: another model.
        """
        self.check(model)
        return self._cache(model, rows)

    def _cache(self, model: Any, rows: int) -> Cache:
        config = model.config.get_text_config(decoder=True)
        cache, device = DynamicCache(config=config), device_of(model)
        students = {layer.layer_idx for layer in converted(model)}
        for index in range(config.num_hidden_layers):
            held = {name: repeated(x, rows).to(device) for name, x in self.layer(index).items()}
            if index in students:
                layer = adopt(cache, index)
                layer.state, layer.is_initialized, layer.plain = State(held), True, True
                layer._count(self.tokens)
            elif held:
                kept: Any = cache.layers[index]
                kept.lazy_initialization(held["keys"], held["values"])
                kept.keys, kept.values = held["keys"], held["values"]
                if isinstance(kept, DynamicSlidingWindowLayer):
                    kept.cumulative_length = self.tokens
        return cache


def read_ids(
    model: Any, ids: Sequence[int] | Tensor, *, tokenizer: Any = None, after: Prefix | None = None
) -> Prefix:
    """Read a text once, in one chunked forward, and keep what decoding needs behind it.

    Args:
        model: a causal language model of transformers, converted or not.
        ids: [T] or [1, T], at least one.
        tokenizer: whose ids they are: a state read with one refuses another.
        after: what has been read before; it stays as it is.

    Raises:
        LinearizeError: no token, several rows, or more tokens than the model's positions reach.
        UnsupportedModelError: a layer holds something else than a mixer's state or keys and values.
    """
    row = _row(ids)
    if not row:
        raise LinearizeError("there is no token to read; give at least one")
    before = 0 if after is None else after.tokens
    check_reach(model, before + len(row))
    _check_students(model)
    if after is not None:
        after.check(model, tokenizer)
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config) if after is None else after._cache(model, 1)
    given: dict[str, Any] = {cache_name(model): cache, "use_cache": True}
    if "logits_to_keep" in forward_names(model):
        given["logits_to_keep"] = 1
    with torch.no_grad(), evaluating(model):
        model(input_ids=torch.tensor([row], device=device_of(model)), **given)
    tensors = _taken(cache, before + len(row))
    digest = _digest(row, "" if after is None else after.digest)
    return Prefix(tensors, before + len(row), row[-1], digest, identity(model, tokenizer))


def state_of(model: Any, cache: Cache, ids: Sequence[int] | Tensor, *, tokenizer: Any = None) -> Prefix:
    """What a cache of transformers holds of one text, copied; `model.generate` returns it as `past_key_values`.

    Args:
        model: which filled it.
        cache: of one row without padding.
        ids: [T] or [1, T] of the tokens that it has read; the last one that generate() made is not among them.
        tokenizer: whose ids they are.

    Raises:
        LinearizeError: several rows, padding, or as many ids as the cache has not read.
        UnsupportedModelError: a layer holds something else than a mixer's state or keys and values.
    """
    row, held = _row(ids), int(cache.get_seq_length())
    if not row or len(row) != held:
        raise LinearizeError(
            f"{len(row):,} ids for a cache that has read {held:,} tokens; give the ids that it has read, without the "
            "last one that generate() made, which nothing has read yet"
        )
    check_reach(model, held)
    _check_students(model)
    return Prefix(_taken(cache, held), held, row[-1], _digest(row), identity(model, tokenizer))


def repeated(tensor: Tensor, rows: int) -> Tensor:
    """One row [1, ...] so many times, in memory of its own."""
    return tensor.expand(rows, *tensor.shape[1:]).clone(memory_format=torch.contiguous_format)


def _taken(cache: Cache, tokens: int) -> dict[str, Tensor]:
    """Copies of what the layers of a cache of one text hold, by layer and name."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearizedCacheLayer):
            if isinstance(layer, LinearAttentionCacheLayerMixin) or not isinstance(layer, DynamicLayer):
                raise _other(index, layer)
            held = {} if layer.state is None else layer.state.tensors
            read = layer.read
            if read is not None and bool(((read.padding != 0) | (read.texts != read.tokens)).any()):
                raise LinearizeError(
                    "the cache has read padding; a state holds one text without it: read it alone"
                )
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            held = {name: getattr(layer, name) for name in KEYS} if layer.is_initialized else {}
        else:
            raise _other(index, layer)
        for name, tensor in held.items():
            if tensor.shape[0] != 1:
                raise LinearizeError(
                    f"the cache holds {tensor.shape[0]} texts, and a state holds one; choose a row with "
                    "cache.batch_select_indices, or read each text alone"
                )
            found[f"{index}.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return found


def _other(index: int, layer: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {index} holds its past in a {type(layer).__name__}, which cannot be kept in a state; that can be done "
        "of converted layers, and of softmax layers in the cache that generate() makes by default (DynamicCache)"
    )


def _check_students(model: Any) -> None:
    layers = converted(model)
    if layers and layers[0].linearize_switch.mode != "student":
        raise LinearizeError(
            "the converted layers run as their teacher, whose past is no state; leave that mode"
        )


def _split(name: str) -> tuple[int, str]:
    index, _, held = name.partition(".")
    return int(index), held


def _row(ids: Sequence[int] | Tensor) -> list[int]:
    """Ids of one text as a list."""
    if isinstance(ids, Tensor):
        if ids.dim() == 2 and ids.shape[0] != 1:
            raise LinearizeError(f"{ids.shape[0]} texts, and a state holds one: read each alone")
        ids = ids.flatten().tolist()
    return [int(token) for token in ids]


def _digest(ids: Sequence[int], before: str = "") -> str:
    """One number for ids in their order: the same whether they were read in one piece or in several."""
    digest = bytes.fromhex(before)
    for token in ids:
        digest = hashlib.sha256(digest + token.to_bytes(8, "little", signed=True)).digest()
    return digest.hex()
