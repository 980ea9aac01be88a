"""A model called on rows of texts, each at a place of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from linearize.decode.arguments import cache_name, forward_names
from linearize.decode.bounded import holds_tokens
from linearize.decode.masks import Masks, token_masks
from linearize.decode.reach import furthest
from linearize.decode.row_cache import Places, Row, RowKeys, RowState
from linearize.surgery import converted

WIDTH = 64
"""Softmax layers hold a multiple of so many places."""
ENDLESS = 2**31
"""Length where nothing depends on it."""


class RowModel:
    """See above.

    Args:
        model: a causal language model of transformers in evaluation mode, on one device.
        length: tokens of a text that softmax layers hold.
        most: places beyond which a text cannot go, or None.

    Attributes:
        keeps: some layers were not converted.
        length: tokens of a text.
        held: places that softmax layers have for a text, at least one more than it may have tokens, for padding; 0
            where nothing that a layer holds depends on the length.
    """

    def __init__(self, model: Any, length: int, most: int | None) -> None:
        self.model, self.config = model, model.config.get_text_config()
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._converted = {layer.layer_idx for layer in converted(model)}
        self.keeps = len(self._converted) < self.config.num_hidden_layers
        holds = holds_tokens(model)
        self.length = min(length if holds else ENDLESS, most or ENDLESS, furthest(model) or ENDLESS)
        self.held = (length // WIDTH + 1) * WIDTH if holds else 0
        self._cache_name = cache_name(model)
        self._optional = {"logits_to_keep": 1} if "logits_to_keep" in forward_names(model) else {}
        # masks are read by kept softmax layers alone
        seen = torch.ones(1, 1, dtype=torch.bool, device=self.device)
        self._no_masks = token_masks(self.config, seen, seen.new_zeros((), dtype=torch.int64), self.dtype)
        self._seen = seen.expand(1, self.held)

    def row(self) -> Row:
        """What a row holds: names, shapes and dtypes, found by reading two tokens into short ones."""
        short = self._read(min(self.held, WIDTH))
        if self.held <= WIDTH:
            return Row.between(short, short, 0)
        # how much a row may be is the caller's word, so that one of its length may not fit into memory
        return Row.between(short, self._read(2 * WIDTH), self.held // WIDTH - 1)

    def _read(self, held: int) -> Cache:
        """A row with so many places, in which two tokens have been read."""
        places = torch.arange(2, device=self.device)[None]
        at = Places(places[0, :1], places, 0)
        kinds = (RowState if i in self._converted else RowKeys for i in range(self.config.num_hidden_layers))
        made = Cache(layers=[kind(at, held) for kind in kinds])
        self(torch.zeros_like(places), places, made, held)
        return made

    def __call__(self, ids: Tensor, places: Tensor, cache: Cache, width: int) -> Tensor:
        """Logits [B, V] of the last column of ids [B, T], at places [B, T]; softmax layers see the first `width`."""
        masks: Masks = self._no_masks
        if self.keeps:
            masks = token_masks(self.config, self._seen[:, :width], places, self.dtype)
        given = {self._cache_name: cache, "use_cache": True, "attention_mask": masks, **self._optional}
        # the places of padding may lie behind a table's end
        positions = places.clamp_max(self.length - 1)
        return self.model(input_ids=ids, position_ids=positions, **given).logits[:, -1]
