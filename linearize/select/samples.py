"""What placements are scored on: held-out text, and pass keys in noise; half of it chooses, half compares."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from linearize import data
from linearize.config.schema import Recipe
from linearize.errors import DataError
from linearize.eval.perplexity import windows
from linearize.eval.recall.haystack import Haystack
from linearize.eval.recall.passkey import passkey
from linearize.eval.recall_split import distances

log = logging.getLogger(__name__)

KL, KL_HIT, KL_PASSKEY = "kl", "kl_hit", "kl_passkey"
"""Metrics: over all tokens, at those whose bigram occurred earlier in the window, and at those of a pass key."""
TEXT, PASSKEYS = "text", "passkey"


@dataclass(frozen=True)
class Sample:
    """Windows that are scored together.

    Attributes:
        ids: int64 [N, T].
        masks: metric -> bool [N, T - 1], the predicted tokens that it is a mean of.
    """

    ids: Tensor
    masks: dict[str, Tensor]


@dataclass(frozen=True)
class Halves:
    """Windows that layers are chosen on, and others, on which placements are compared."""

    choice: Sample
    unseen: Sample


def text(tokenizer: Any, recipe: Recipe, count: int, length: int) -> Halves:
    """The recipe's held-out text; every other window chooses, so that both halves are of the same documents.

    Args:
        tokenizer: of the model.
        recipe: its `data`.
        count: windows in a half, as far as the text goes.
        length: tokens in a window.

    Raises:
        DataError: there are no two windows of text.
    """
    documents = data.validation_documents(recipe.data, tokenizer)
    cut = windows(tokenizer, documents, window=length, max_windows=2 * count)
    if len(cut) < 2:
        raise DataError(
            f"the held-out text fills one window of {length} tokens, and choosing takes at least two: give more text "
            "(data.validation) or a smaller --length"
        )
    if len(cut) < 2 * count:
        log.info("the held-out text fills %s of %s windows", len(cut), 2 * count)
    return Halves(of_text(cut[0::2]), of_text(cut[1::2]))


def of_text(ids: Tensor) -> Sample:
    """Windows of text, with all tokens and the repeated pairs (Zoology, arXiv 2312.04927) as metrics."""
    everywhere = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    return Sample(ids, {KL: everywhere, KL_HIT: distances(ids) > 0})


def passkeys(tokenizer: Any, count: int, length: int, seed: int) -> Halves:
    """Prompts of `passkey` with their answers, at even depths.

    Args:
        tokenizer: of the model.
        count: prompts in a half.
        length: tokens of a prompt and its answer.
        seed: of numbers; the halves have different ones.

    Raises:
        DataError: the prompt alone is longer.
    """
    haystack = Haystack(tokenizer)
    halves = []
    for half in ("choice", "unseen"):
        rows, where = [], []
        for number in range(count):
            drawn = Random(f"{seed} select {half} {length} {number}")
            item = passkey(drawn, (number + 0.5) / count)
            answer = haystack.assemble(item, length, drawn).answers[0]
            rows.append([*haystack.assemble(item, length - len(answer), drawn).ids, *answer])
            where.append([place >= length - len(answer) for place in range(1, length)])
        halves.append(Sample(torch.tensor(rows), {KL_PASSKEY: torch.tensor(where)}))
    return Halves(*halves)
