"""Logits of a text read token by token, as decoding reads it: what a state carried along makes of each token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linearize import surgery
from linearize.decode import Decoder
from linearize.decode.choice import obstacles
from linearize.decode.generate import evaluating
from linearize.errors import LinearizeError
from linearize.eval.recall.answering import Cached

TOGETHER = 64
"""Steps whose logits are handed out at once: whoever looks at them waits for the device."""

log = logging.getLogger(__name__)


class Dictation:
    """Stands where a decoder chooses a token: the text's own is next, and what was expected is written down.

    All of it stays on the device, so that a captured step does the same when it is replayed.

    Args:
        ids: int64 [T].
        vocabulary: columns of the logits.
        device: the model's.
    """

    def __init__(self, ids: Tensor, vocabulary: int, device: torch.device) -> None:
        self.ids = ids.to(device)
        self.logits = torch.zeros(TOGETHER, vocabulary, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def choose(self, logits: Tensor) -> Tensor:
        """The text's next token [1], for logits [1, V] behind the one before it."""
        self.logits.index_copy_(0, self.place % TOGETHER, logits.float())
        self.place.add_(1)
        return self.ids[self.place.clamp_max(len(self.ids) - 1)]


def dictated(model: Any, ids: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Logits [n, V], float32, behind each token, `TOGETHER` at a time; each is overwritten by the next.

    A converted model on a GPU runs the captured step of `linearize generate`, any other transformers' own cache.

    Args:
        model: in evaluation mode.
        ids: int64 [T].
        vocabulary: columns of its logits.
    """
    decoder = _decoder(model, ids, vocabulary) if surgery.converted(model) and not obstacles(model) else None
    yield from _cached(model, ids) if decoder is None else _captured(*decoder, ids)


def _decoder(model: Any, ids: Tensor, vocabulary: int) -> tuple[Decoder, Dictation] | None:
    dictation = Dictation(ids, vocabulary, next(model.parameters()).device)
    decoder = Decoder(model, 1, dictation, length=len(ids))  # type: ignore[arg-type]
    try:
        with evaluating(model):
            decoder.prepare()
    except (LinearizeError, RuntimeError) as error:
        log.info("decoding step by step, since the step cannot be captured: %s", error)
        return None
    return decoder, dictation


def _captured(decoder: Decoder, dictation: Dictation, ids: Tensor) -> Iterator[Tensor]:
    with evaluating(decoder.model):
        for start in range(0, len(ids), TOGETHER):
            size = min(TOGETHER, len(ids) - start)
            if start == 0:
                dictation.place.zero_()
                decoder.read(ids[None, :1], None)
            decoder.run(size if start else size - 1)
            yield dictation.logits[:size]


def _cached(model: Any, ids: Tensor) -> Iterator[Tensor]:
    cached = Cached(model)
    there = ids[None].to(cached.device)  # a token that has to be sent would wait for the last
    for places in torch.arange(len(ids)).split(TOGETHER):
        yield torch.cat([cached(there[:, place : place + 1]) for place in places.tolist()])
