"""A text that has been read once, as what decoding needs behind it: the state of every layer, to go on from many times.

A linear-attention layer's state has one size whatever the length of the text; kept softmax layers bring their keys and
values along. A prefix is read through transformers' own cache, and goes on in one or, repeated, in the buffers of a
`Decoder`.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from linearize.decode.arguments import cache_name, evaluating, forward_names
from linearize.decode.held import REMEDY, check_layout, growing, split, taken
from linearize.decode.identity import check_identity, identity
from linearize.decode.reach import check_reach
from linearize.errors import LinearizeError
from linearize.mixers import State
from linearize.mixers.offloaded import device_of
from linearize.surgery import converted
from linearize.surgery.cache import adopt


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
        grown = [self.tensors[name] for name in growing(self.tensors)]
        return sum(tensor.numel() * tensor.element_size() for tensor in grown)

    def layer(self, index: int) -> dict[str, Tensor]:
        """What layer `index` holds, by name."""
        return {held: x for name, x in self.tensors.items() for at, held in [split(name)] if at == index}

    def begins(self, ids: Sequence[int] | Tensor) -> bool:
        """Whether a text, as ids, begins with the one that was read."""
        first = _row(ids)[: self.tokens]
        return len(first) == self.tokens and _digest(first) == self.digest

    def check(self, model: Any, tokenizer: Any = None) -> None:
        """Refuse another model than the one that read the text; its weights are summed up and a token is read for that.

        Raises:
            LinearizeError: names what differs.
        """
        check_identity(self.identity, identity(model, tokenizer))
        if self.last >= model.get_input_embeddings().weight.shape[0]:
            raise LinearizeError(
                f"the state's last token is {self.last:,}, which the model does not have; {REMEDY}"
            )
        check_layout(model, self.tensors, self.tokens)

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
        return self.checked_cache(model, rows)

    def checked_cache(self, model: Any, rows: int) -> Cache:
        """`cache` for a model that `check` has let through."""
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
        LinearizeError: no token, several rows, an id that the model does not have, or more tokens than its positions
            reach.
        UnsupportedModelError: a layer holds something else than a mixer's state or keys and values.
    """
    row = _row(ids)
    if not row:
        raise LinearizeError("there is no token to read; give at least one")
    _check_ids(model, row)
    before = 0 if after is None else after.tokens
    check_reach(model, before + len(row))
    _check_students(model)
    if after is not None:
        after.check(model, tokenizer)
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config) if after is None else after.checked_cache(model, 1)
    given: dict[str, Any] = {cache_name(model): cache, "use_cache": True}
    if "logits_to_keep" in forward_names(model):
        given["logits_to_keep"] = 1
    with torch.no_grad(), evaluating(model):
        model(input_ids=torch.tensor([row], device=device_of(model)), **given)
    tensors = taken(cache)
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
    return Prefix(taken(cache), held, row[-1], _digest(row), identity(model, tokenizer))


def repeated(tensor: Tensor, rows: int) -> Tensor:
    """One row [1, ...] so many times, in memory of its own."""
    return tensor.expand(rows, *tensor.shape[1:]).clone(memory_format=torch.contiguous_format)


def _check_students(model: Any) -> None:
    layers = converted(model)
    if layers and layers[0].linearize_switch.mode != "student":
        raise LinearizeError(
            "the converted layers run as their teacher, whose past is no state; leave that mode"
        )


def _row(ids: Sequence[int] | Tensor) -> list[int]:
    """Ids of one text as a list."""
    if isinstance(ids, Tensor):
        if ids.dim() == 2 and ids.shape[0] != 1:
            raise LinearizeError(f"{ids.shape[0]} texts, and a state holds one: read each alone")
        if ids.dim() not in (1, 2):
            raise LinearizeError(f"ids of the shape {list(ids.shape)}: give those of one text, [T] or [1, T]")
        ids = ids.flatten().tolist()
    try:
        # not int(), which would take 1.5 for 1
        return [operator.index(token) for token in ids]
    except TypeError:
        raise LinearizeError(
            "ids must be whole numbers; give those that the tokenizer makes of a text"
        ) from None


def _check_ids(model: Any, ids: list[int]) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    wrong = next((token for token in ids if not 0 <= token < rows), None)
    if wrong is not None:
        raise LinearizeError(
            f"the id {wrong} is no token of the model, whose embedding has rows 0 to {rows - 1:,}; give the ids that "
            "its own tokenizer makes"
        )


def _digest(ids: Sequence[int], before: str = "") -> str:
    """One number for ids in their order: the same whether they were read in one piece or in several."""
    digest = bytes.fromhex(before)
    for token in ids:
        digest = hashlib.sha256(digest + token.to_bytes(8, "little", signed=True)).digest()
    return digest.hex()
