"""What a converted model looks at in its arguments before its own forward runs: positions, and masks ready made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from linearize.errors import UnsupportedModelError
from linearize.surgery.masks import REMEDY, text_rows
from linearize.surgery.positions import layers, left_positions

READ = "linearize_read"
"""Attribute of a cache: what earlier calls have read, see `Read`."""


@dataclass(frozen=True)
class Read:
    """Which of a cache's tokens are text, in memory that does not grow: rows of text behind padding have two numbers.

    Attributes:
        padding: [B] tokens before the first that is text.
        texts: [B] tokens that are text.
        tokens: in all; those that came later one at a time are not counted.
    """

    padding: Tensor
    texts: Tensor
    tokens: int

    @classmethod
    def of(cls, rows: Tensor) -> Read:
        """What [B, S] true-where-text says."""
        return cls(rows.to(torch.int8).argmax(1), rows.sum(1), rows.shape[1])

    def agrees(self, seen: Tensor) -> Tensor:
        """[B] whether [B, S] true-where-seen shows just the text; rows with padding elsewhere pass unchecked."""
        place = torch.arange(self.tokens, device=seen.device)
        padding, texts = self.padding.to(seen.device), self.texts.to(seen.device)
        same = (seen[:, : self.tokens] == (place >= padding[:, None])).all(1)
        return same | (padding + texts != self.tokens)


def looking(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A base model's `forward` that fills in positions (see `left_positions`) and checks masks ready made.

    Its signature stays, which transformers reads.
    """
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if not isinstance(mask, Tensor):
            return forward(self, *args, **kwargs)
        caches = (Cache, EncoderDecoderCache)
        cache = next((x for x in given.values() if isinstance(x, caches)), None)
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if mask.dim() == 2 and "position_ids" in names and given.get("position_ids") is None:
            past = 0 if cache is None else cache.get_seq_length()
            places = None if inputs is None else left_positions(self, mask, inputs.shape[1], past)
            at = names.index("position_ids")
            if places is not None and len(args) > at:
                args = (*args[:at], places, *args[at + 1 :])
            elif places is not None:
                kwargs["position_ids"] = places
        if cache is not None and inputs is not None and not torch.compiler.is_compiling():
            found = layers(self)
            if found and found[0].linearize_switch.mode == "student":
                windows = [layer.mixer.shape.sliding_window for layer in found]
                _follow(cache, mask, inputs.shape[1], min((w for w in windows if w), default=None))
        return forward(self, *args, **kwargs)

    return inner


def _follow(cache: Any, mask: Tensor, tokens: int, window: int | None) -> None:
    """Hold a mask [B, 1, Q, S] that the caller made against what earlier calls have read, and remember this one.

    A state holds every text token of its document: a mask that hides one of them, or opens one that was padding, asks
    for something else. What a mask says of its own tokens the layers check, but for single ones.

    Args:
        cache: of the model, before the call.
        mask: as it was given.
        tokens: Q.
        window: the shortest of the teacher's own sliding windows, or None.

    Raises:
        UnsupportedModelError: it does.
    """
    known = getattr(cache, READ, None)
    if mask.dim() == 2:
        if known is None or tokens > 1:  # decoding launches nothing for this
            setattr(cache, READ, Read.of(mask.to(torch.bool)))
        return
    if mask.dim() != 4 or getattr(cache, "is_compileable", False):
        return  # generate itself makes the masks of static caches
    past = int(cache.get_seq_length())
    first, last, texts = text_rows(mask, tokens, past)
    if known is None:
        known = Read.of(torch.ones(1, past, dtype=torch.bool, device=first.device)) if past else None
    if known is not None and known.padding.shape[0] in (1, first.shape[0]):
        fits = ~texts | known.agrees(first[:, :past])
        if tokens > 1:
            fits |= ~first[:, :past].any(1)  # another document begins
        elif window is not None and past >= window:
            fits &= ~first[:, : past + 1 - window].any(1)
        if not bool(fits.all()):
            raise UnsupportedModelError(
                f"an attention mask that hides tokens of earlier calls, or shows padding among them: {REMEDY}"
            )
    read = Read.of(last)
    # rows that had no text in this call are taken at their word from here on
    setattr(cache, READ, Read(read.padding, torch.where(texts, read.texts, -1), read.tokens))
