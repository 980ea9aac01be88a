"""Sources mixed by weight: each is packed by itself, and their sequences take turns.

A mix is exact in sequences, so in tokens: of N of them a source gives its share, rounded. Their order is a function of
the seed; a source that has too little text is gone over again, in another order each time. Nothing is copied: each
source's tokens stay where packing has stored them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from linearize.config import mix
from linearize.data.packing import PackedDataset, packed
from linearize.data.text import load_texts
from linearize.errors import LinearizeError, collected, raise_together

if TYPE_CHECKING:
    from linearize.config.schema import DataConfig

log = logging.getLogger(__name__)


class MixedDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of several packed data sets in one order.

    Args:
        parts: of one length.
        counts: sequences that each gives.
        seed: of the order.
    """

    def __init__(self, parts: Sequence[PackedDataset], counts: Sequence[int], seed: int) -> None:
        self._parts, self._seed = list(parts), seed
        self.length = self._parts[0].length
        rng = np.random.default_rng(seed)
        # one place in each n-th of the whole: no stretch has much more or less of a source than its share
        places = [(np.arange(n) + rng.random(n)) / max(n, 1) for n in counts]
        order = np.argsort(np.concatenate(places), kind="stable")
        self._which = np.repeat(np.arange(len(counts)), counts)[order]
        self._number = np.concatenate([np.arange(n) for n in counts])[order]
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences together."""
        return len(self) * self.length

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        which, number = int(self._which[index]), int(self._number[index])
        part = self._parts[which]
        turn, place = divmod(number, len(part))
        if turn:
            key = which, turn
            if key not in self._orders:
                self._orders[key] = np.random.default_rng([self._seed, *key]).permutation(len(part))
            place = int(self._orders[key][place])
        return part[place]


def mixed(tokenizer: Any, config: DataConfig, *, tokens: int, seed: int) -> MixedDataset:
    """The packed sequences of a token budget out of `config.mix`; see `packing.packed`.

    Raises:
        DataError: a source is missing, unreadable or too short; of several, all are named.
    """
    found = mix.parts(config)
    check(tokenizer, config)
    total = max(1, math.ceil(tokens / config.length))
    counts = shares([share for _, share, _ in found], total)
    for (name, share, _), count in zip(found, counts, strict=True):
        if not count:
            log.info("data.mix: %.2g %% of %d sequences is none of %s", 100 * share, total, name)
    errors: list[LinearizeError] = []
    parts: list[PackedDataset] = []
    kept = [(read, count) for (_, _, read), count in zip(found, counts, strict=True) if count]
    for number, (read, count) in enumerate(kept):
        with collected(errors):
            parts.append(packed(tokenizer, read, tokens=count * config.length, seed=seed + number))
    raise_together(errors, "data.mix")
    return MixedDataset(parts, [count for _, count in kept], seed)


def check(tokenizer: Any, config: DataConfig, *, without: str | None = None) -> None:
    """Look at every source of a mix, and read none through.

    Args:
        tokenizer: see `packing.packed`.
        config: its `mix`.
        without: a source that is not there yet.

    Raises:
        DataError: see `mixed`.
    """
    errors: list[LinearizeError] = []
    for name, _, read in mix.parts(config):
        if name != without:
            with collected(errors):
                load_texts(
                    read.source,
                    split=read.split,
                    text_field=read.text_field,
                    template=read.template,
                    tokenizer=tokenizer,
                )
    raise_together(errors, "data.mix")


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each nearest its share (largest remainders)."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(number) for number in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts
