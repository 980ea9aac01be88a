"""A model that writes one document after another in every row, in one captured step that no row leaves.

A row that ends a document, or has begun to loop in it, begins the next one in the same step, so that every step makes a
token of text for each row.
An opening is put in the place of what was chosen, token by token: nothing is prefilled, nothing padded. Keys lie in a
ring; a document sees as many of the newest as it has tokens, so what was written before it needs no clearing. Which
opening comes, where a document stands and what was written are tensors on the device: the host looks once a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linearize.decode import Decoder, Sampling
from linearize.decode.newest import attending, newest_numbers
from linearize.sample.loops import Watch

START, ENDED = 1 << 30, 1 << 29
"""Bits of a written token: first of a document; the document before it had come to its end, and was not cut."""
TOKEN = ENDED - 1
LOOK = 64
"""Steps between two looks of the host at how far it is."""


class Writer(Decoder):
    """See above.

    Args:
        model: a causal language model of transformers whose layers are all softmax, in evaluation mode, on one device.
        batch: rows.
        sampling: how tokens are chosen.
        openings: ids of each opening, none empty, each shorter than `length`.
        ends: tokens that end a document where one is chosen; they are not written.
        length: tokens that a document has at most.
        steps: tokens of a row in a round.
        capture, compile: see `Decoder`.
    """

    goes_round = True

    def __init__(
        self,
        model: Any,
        batch: int,
        sampling: Sampling,
        openings: Sequence[Sequence[int]],
        *,
        ends: Sequence[int],
        length: int,
        steps: int,
        capture: bool = True,
        compile: dict[str, Any] | None = None,  # noqa: A002 - torch's name
    ) -> None:
        super().__init__(model, batch, sampling, length=length, capture=capture, compile=compile)
        assert self.holds_tokens and 0 < max(map(len, openings)) < length
        self.round = steps
        longest = max(map(len, openings))
        table = torch.zeros(len(openings), longest, dtype=torch.int64)
        for row, ids in zip(table, openings, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        is_end = torch.zeros(vocabulary, dtype=torch.bool)
        is_end[list(ends)] = True
        self.table, self.is_end = table.to(self.device), is_end.to(self.device)
        self.sizes = torch.tensor(list(map(len, openings)), device=self.device)
        self.order = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.opening = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.documents = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.watch = Watch(batch, length, self.device)
        self.written = torch.zeros(batch, steps, dtype=torch.int32, device=self.device)

    def prepare_order(self, documents: int) -> None:
        """Make room for so many openings a row, and capture."""
        self.order = torch.zeros(self.batch, documents, dtype=torch.int64, device=self.device)
        with attending(self.config):
            self.prepare()

    @torch.no_grad()
    def write(
        self, order: np.ndarray, seed: int, on_steps: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """A round: what every row writes in `steps` tokens, a function of openings and seed alone.

        Args:
            order: [B, Q] numbers of openings, as many a row as `prepare_order` has made room for; after the last comes
                the first.
            seed: of the draws.
            on_steps: told how many steps more are done, now and then.

        Returns:
            [B, steps] int32 tokens with the bits START and ENDED.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), attending(self.config):
            torch.manual_seed(seed)
            self._begin(order)
            left = self.round - 1
            while left:
                steps = min(LOOK, left)
                self.run(steps)
                left -= steps
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                if on_steps is not None:
                    on_steps(steps)
        return self.written.cpu().numpy().copy()  # the next round writes where this one lies

    def release(self) -> None:
        """Give the memory of keys and graph back; nothing can be written any more.

        What torch has compiled may hold on to this object for longer.
        """
        self._graph = None
        self.cache.layers.clear()

    def _begin(self, order: np.ndarray) -> None:
        self.order.copy_(torch.from_numpy(order))
        self.clock.start(0)
        self.documents.zero_()
        self.opening.copy_(self.order[:, 0])
        self.tokens.copy_(self.table[self.opening, :1])
        self.positions.zero_()
        self.written.zero_()
        self.written[:, 0] = (self.tokens[:, 0] + START).int()
        self.column.fill_(1)
        self.watch.begin(self.tokens[:, 0])

    def _eager_step(self) -> None:
        logits = self._forward(
            self.tokens,
            self.positions,
            attention_mask=newest_numbers(self.config, self.clock.tokens, self.positions + 1),
        )
        self.clock.tokens.add_(1).remainder_(self.length)
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        """Choose from logits [B, V], or go on with the opening, or with the next one."""
        chosen = self.sampling.choose(logits)
        place = self.positions[:, 0] + 1
        inside = place < self.sizes[self.opening]
        given = self.table[self.opening, place.clamp(max=self.table.shape[1] - 1)]
        ended = self.is_end[chosen] & ~inside
        over = ended | (place >= self.length) | self.watch.looping
        self.documents.add_(over)
        self.opening.copy_(self.order.gather(1, (self.documents % self.order.shape[1])[:, None])[:, 0])
        token = torch.where(over, self.table[self.opening, 0], torch.where(inside, given, chosen))
        self.tokens.copy_(token[:, None])
        place = torch.where(over, 0, place)
        self.positions.copy_(place[:, None])
        self.watch.take(token, place)
        marked = token + over * START + ended * ENDED
        self.written.index_copy_(1, self.column, marked.int()[:, None])
        self.column.copy_((self.column + 1) % self.round)
