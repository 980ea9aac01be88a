"""What a model says of every token of a text, and how far it is from the teacher there; logits a slice at a time.

A pass keeps the hidden states before the head, and the head is applied to some tokens at once, so that a window of
32,768 tokens never has 32,768 rows of logits. The teacher's hidden states are kept from its own pass: its transformer
runs once for all models that are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.decode.generate import evaluating
from linearize.kernels.distill import Head
from linearize.kernels.distill.reference import shape_logits
from linearize.mixers.offloaded import device_of
from linearize.objectives.headless import predict_final, recognize
from linearize.objectives.whole import whole_logits

LOGITS_AT_ONCE = 2**24
"""Elements of the float32 logits that exist at a time: 341 tokens of a 49k vocabulary, 64 MB; twice that on a GPU."""
TOKENS_AT_ONCE = 2**13
"""Of windows that go through the model together on a GPU, which waits for launches where a window is short."""


@dataclass
class TokenScores:
    """Scores of every token but the first of each window; tensors on the CPU."""

    nll: Tensor
    """[N, T - 1] negative log-likelihood of the token, nats."""
    kl: Tensor | None = None
    """[N, T - 1] KL(teacher || model) of the prediction, nats."""
    agrees: Tensor | None = None
    """[N, T - 1] 1 where the likeliest token is the teacher's."""


class Predictor:
    """Predictions of one model for windows of text.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        autocast: dtype for torch.autocast on the model's device; None runs in the model's own dtype.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.device = device_of(model)
        self.autocast = autocast
        self.head: Head | None = recognize(model, self.device)
        self._kept: dict[bytes, Tensor] = {}

    def _context(self) -> Any:
        return (
            nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)
        )

    def window(self, ids: Tensor, *, keep: bool = False) -> Callable[[slice | Tensor], Tensor]:
        """Run one window; the result gives log-probabilities [n, V], float32 or wider, of a slice's or places' tokens.

        Args:
            ids: int64 [T].
            keep: the hidden states stay in the CPU's memory, and the next call with the same tokens runs no model.
        """
        return self.windows(ids[None], keep=keep)[0]

    def windows(self, ids: Tensor, *, keep: bool = False) -> list[Callable[[slice | Tensor], Tensor]]:
        """The same for windows [B, T] that go through the model together, as far as their logits can be left out."""
        head = self.head
        with torch.no_grad(), evaluating(self.model), self._context():
            if head is None:
                return [self._whole(row) for row in ids]
            names = [row.numpy().tobytes() for row in ids] if keep else []
            if keep and all(name in self._kept for name in names):
                hidden = [self._kept[name] for name in names]
            else:
                final = predict_final(self.model, {"input_ids": ids.to(self.device)}, head)
                hidden = list(final.hidden.detach())
                self._kept |= {name: row.to("cpu") for name, row in zip(names, hidden, strict=False)}
        return [partial(self._part, head, row) for row in hidden]

    def together(self, length: int) -> int:
        """How many windows of a length go through the model at once."""
        many = (
            self.device.type == "cuda" and self.head is not None
        )  # without a head, all logits would be there
        return max(1, TOKENS_AT_ONCE // length) if many else 1

    def _whole(self, ids: Tensor) -> Callable[[slice | Tensor], Tensor]:
        logits = whole_logits(self.model, ids[None].to(self.device))[0]
        return lambda part: F.log_softmax(_wide(logits[part]), -1)

    def _part(self, head: Head, hidden: Tensor, part: slice | Tensor) -> Tensor:
        return self._apply(head, hidden[part])

    def _apply(self, head: Head, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            with self._context():
                product = F.linear(hidden.to(self.device), head.weight, head.bias)
            return F.log_softmax(shape_logits(_wide(product), head), -1)


def score_tokens(
    model: Predictor,
    windows: Tensor,
    teacher: Predictor | None = None,
    *,
    meter: Any = None,
    where: Tensor | None = None,
) -> TokenScores:
    """Scores of every token but the first of each window.

    Args:
        model: the model.
        windows: int64 [N, T].
        teacher: what it is compared with; its passes over the same windows are kept for the next model.
        meter: object with `advance(tokens)`, called after each window.
        where: bool [N, T - 1], the tokens that are scored, the others being 0; None scores all.
    """
    length = windows.shape[1]
    nll = torch.zeros(len(windows), length - 1)
    kl, agrees = (None, None) if teacher is None else (torch.zeros_like(nll), torch.zeros_like(nll))
    most = LOGITS_AT_ONCE * (2 if model.device.type == "cuda" else 1)
    number = 0
    together = min(one.together(length) for one in (model, teacher) if one is not None)
    for some in windows.split(together):
        passes = model.windows(some)
        others = [None] * len(some) if teacher is None else teacher.windows(some, keep=True)
        for ids, own, other in zip(some, passes, others, strict=True):
            wanted = None if where is None else where[number].nonzero()[:, 0]
            scored = length - 1 if wanted is None else len(wanted)
            for cut in slices(scored, own(slice(0, 1)).shape[-1], most):
                part = cut if wanted is None else wanted[cut]
                found = own(part)
                targets = ids[1:][part].to(found.device)
                nll[number, part] = -found.gather(1, targets[:, None])[:, 0].float().cpu()
                if other is not None and kl is not None and agrees is not None:
                    expected = other(part).to(found.device)
                    kl[number, part] = divergence(expected, found).float().cpu()
                    agrees[number, part] = (expected.argmax(-1) == found.argmax(-1)).float().cpu()
            number += 1
            if meter is not None:
                meter.advance(length)
    return TokenScores(nll, kl, agrees)


def divergence(teacher: Tensor, model: Tensor) -> Tensor:
    """KL(teacher || model) [n] of log-probabilities [n, V], over the tokens that both have."""
    shared = min(teacher.shape[-1], model.shape[-1])
    teacher, model = teacher[:, :shared], model[:, :shared]
    return (teacher.exp() * (teacher - model)).sum(-1).clamp_min(0)


def slices(tokens: int, vocabulary: int, most: int | None = None) -> list[slice]:
    """Slices that cover all tokens, each of at most `most` logits, by default `LOGITS_AT_ONCE`."""
    rows = max(1, (most or LOGITS_AT_ONCE) // vocabulary)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
