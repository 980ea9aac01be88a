"""Rows in which passages come again: text whose every copy has to be remembered, made of any text.

What a model without softmax loses first is to say again what it has read (recall of repeated n-grams: Zoology, arXiv
2312.04927; copying: Jelassi et al. 2024, arXiv 2402.01032). A teacher's induction heads foretell a passage that comes
again almost surely from its second token on, so a row with copies holds many tokens on which the two differ, where
ordinary text has few. Ours.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from linearize.data.packing import IGNORED

SHORTEST, LONGEST = 8, 64
"""Tokens of a passage; its logarithm is drawn evenly."""

LEAST = 4 * SHORTEST
"""Tokens of a document that is worth it."""


class Echoed(Dataset[dict[str, Tensor]]):
    """A packed data set, in some of whose rows passages of the longest document are put again further on in it.

    About a third of such a document's tokens are copies. Which, and in which rows, is fixed by the seed and the row's
    number. The token that a copy begins with is not trained on as a next token: nothing announces it.

    Args:
        dataset: items `input_ids`, `position_ids`, `labels`, each [T].
        share: of the rows, 0 to 1.
        seed: of the draws.
    """

    def __init__(self, dataset: Any, *, share: float, seed: int) -> None:
        self.dataset = dataset
        self.share = share
        self.seed = seed

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows together."""
        return self.dataset.num_tokens

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.again(self.dataset[index], index)

    def again(self, item: dict[str, Tensor], *number: int) -> dict[str, Tensor]:
        """A row, or a stretch of one, where the draws want it with copies of what it holds itself.

        Args:
            item: of the data set, or cut out of one.
            number: of the row, and of the stretch where it is one: what fixes the draws beside the seed.
        """
        draw = np.random.default_rng((self.seed, *number))
        return echoed(item, draw) if draw.random() < self.share else item


def echoed(item: dict[str, Tensor], draw: np.random.Generator) -> dict[str, Tensor]:
    """A row with copies of its own passages, where its longest document is long enough."""
    first, end = _longest(item["position_ids"].numpy())
    if end - first < LEAST:
        return item
    ids, labels = item["input_ids"].numpy().copy(), item["labels"].numpy().copy()
    place = first + int(draw.integers(SHORTEST, max(SHORTEST + 1, (end - first) // 4)))
    while True:
        count = round(float(np.exp(draw.uniform(np.log(SHORTEST), np.log(LONGEST)))))
        count = min(count, place - first, end - place)
        if count < SHORTEST:
            break
        source = int(draw.integers(first, place - count + 1))
        ids[place : place + count] = ids[source : source + count]
        labels[place : place + count] = np.where(
            labels[place : place + count] == IGNORED, IGNORED, ids[place : place + count]
        )
        labels[place] = IGNORED
        place += count + round(count * float(draw.uniform(1, 3)))
    return {**item, "input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _longest(positions: np.ndarray) -> tuple[int, int]:
    """First token of a row's longest document, and the one behind its last."""
    starts = np.flatnonzero(positions == 0).tolist()
    edges = [0, *(start for start in starts if start), len(positions)]
    return max(pairwise(edges), key=lambda pair: pair[1] - pair[0])
