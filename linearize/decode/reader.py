"""A model and its cache of fixed size: how prompts get into it, whatever comes behind them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from linearize.decode.arguments import cache_name, forward_names
from linearize.decode.bounded import holds_tokens
from linearize.decode.cache import Clock, fixed_cache
from linearize.decode.masks import token_masks
from linearize.decode.prefix import Prefix
from linearize.errors import LinearizeError
from linearize.memory import Room
from linearize.surgery import converted

UNEQUAL = (
    "prompts of unequal length behind a state: padding would stand between it and the shorter ones; give prompts of as "
    "many tokens each, or one after the other"
)

BESIDE = 640
"""Bytes of a row's numbers beside states and keys: its place, its last tokens."""


class Reader:
    """See above.

    Args:
        model: a causal language model of transformers in evaluation mode, on one device.
        batch: rows.
        length: most tokens, prompt included, if any layer is softmax.
        make: the cache and its clock, as `fixed_cache` makes them.

    Attributes:
        keeps_softmax: some layers were not converted.
        holds_tokens: what a layer holds depends on the length of the text.
        room: memory that the layers' buffers and states are held against before they are made.
        positions: [B, 1] int64, of each row's next token.
        seen: [B, length] bool, false on the prompt's padding.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        make: Callable[[int, set[int], int, torch.device], tuple[Cache, Clock]] = fixed_cache,
    ) -> None:
        config = model.config.get_text_config()
        parameter = next(model.parameters())
        layers = {layer.layer_idx for layer in converted(model)}
        self.model, self.batch, self.config = model, batch, config
        self.device, self.dtype = parameter.device, parameter.dtype
        self.keeps_softmax = len(layers) < config.num_hidden_layers
        self.holds_tokens = holds_tokens(model)
        self.length = length if self.holds_tokens else 0
        long = f" of {self.length:,} tokens" if self.length else ""
        self.room = Room(
            self.device,
            f"the states and keys of {batch:,} texts{long}",
            "take fewer at a time, or shorter ones",
        )
        # `seen`, and the ages of tokens that masks are made of: before the layers, which each say what they take
        self.room.take((batch + 8) * self.length + BESIDE * batch)
        self.cache, self.clock = make(config.num_hidden_layers, layers, self.length, self.device)
        self.clock.room = self.room
        self._cache_name = cache_name(model)
        self._optional = {"logits_to_keep": 1} if "logits_to_keep" in forward_names(model) else {}
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.seen = torch.ones(batch, self.length, dtype=torch.bool, device=self.device)
        # masks of what comes behind a prompt are read by kept softmax layers alone
        one = torch.ones(1, 1, dtype=torch.bool, device=self.device)
        self._no_masks = token_masks(config, one, torch.zeros_like(self.positions[0, 0]), self.dtype)

    def forget(self) -> None:
        """Empty the cache."""
        self.cache.reset()
        self.clock.running, self.clock.before = False, 0

    def fill(self, ids: Tensor, mask: Tensor | None, prefix: Prefix | None = None) -> Tensor:
        """Read prompts [B, T] in chunked form behind nothing or behind a prefix, into an empty cache.

        Args:
            ids: [B, T] int64, padded on the left.
            mask: [B, T], 0 on padding, or None.
            prefix: what every row has read before; there is no padding then.

        Returns:
            Logits [B, V] of what follows.

        Raises:
            LinearizeError: padding behind a prefix.
        """
        ids = ids.to(self.device)
        before = 0 if prefix is None else prefix.tokens
        padded = mask is not None and not bool(mask.all())
        if padded and before:
            raise LinearizeError(UNEQUAL)
        if prefix is not None:
            layer: Any  # a FixedState or a FixedKeys
            for index, layer in enumerate(self.cache.layers):
                layer.hold(prefix.layer(index), before)
            self.clock.before = before
        mask = mask.to(self.device).long() if padded and mask is not None else torch.ones_like(ids)
        positions = (mask.cumsum(1) - 1).clamp_min(0) + before
        total = before + ids.shape[1]
        if self.length:
            self.seen[:, before:total] = mask.bool()
            self.seen[:, :before] = True
            self.seen[:, total:] = True
        given = {"attention_mask": mask} if padded else {}
        logits = self._forward(ids, positions, **given)
        self.clock.start(total)
        self.positions.copy_(before + mask.sum(1, keepdim=True))
        return logits

    def _decoding(self) -> AbstractContextManager[Any]:
        """How transformers runs one-token steps: experts of a mixture in the form that is quicker there."""
        switch = getattr(self.model, "_optimize_model_for_decode", None)
        return nullcontext() if switch is None else switch()

    def _forward(self, ids: Tensor, positions: Tensor, **given: Any) -> Tensor:
        """Logits [B, V] of the last column."""
        arguments = {self._cache_name: self.cache, "use_cache": True, **self._optional, **given}
        return self.model(input_ids=ids, position_ids=positions, **arguments).logits[:, -1]
