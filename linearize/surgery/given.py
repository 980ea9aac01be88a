"""What a converted model looks at in its arguments before its own forward runs: positions, and masks ready made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from linearize.errors import LinearizeError, UnsupportedModelError
from linearize.surgery import handed_on
from linearize.surgery.cache import LinearizedCacheLayer
from linearize.surgery.masks import REMEDY, text_rows
from linearize.surgery.positions import layers, left_positions
from linearize.surgery.read import Read


def looking(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A base model's `forward` that fills in positions (see `left_positions`) and checks masks ready made.

    Its signature stays, which transformers reads.
    """
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        found = layers(self)
        if any(layer.mixer.uses_first for layer in found):
            kwargs[handed_on.NAME] = handed_on.FirstLayer()
        caches = (Cache, EncoderDecoderCache)
        cache = next((x for x in given.values() if isinstance(x, caches)), None)
        if not isinstance(mask, Tensor) and mask is not None:
            return forward(self, *args, **kwargs)
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if isinstance(inputs, Tensor) and not torch.compiler.is_compiling():
            _check_shapes(inputs, mask, cache)
        unnumbered = "position_ids" in names and given.get("position_ids") is None
        if isinstance(mask, Tensor) and mask.dim() == 2 and unnumbered:
            past = 0 if cache is None else cache.get_seq_length()
            places = None if inputs is None else left_positions(self, mask, inputs.shape[1], past)
            at = names.index("position_ids")
            if places is not None and len(args) > at:
                args = (*args[:at], places, *args[at + 1 :])
            elif places is not None:
                kwargs["position_ids"] = places
        switch = found[0].linearize_switch if found and isinstance(inputs, Tensor) else None
        if (
            inputs is None
            or switch is None
            or switch.mode != "student"
            or switch.trusts
            or torch.compiler.is_compiling()
        ):
            return forward(self, *args, **kwargs)
        windows = [layer.mixer.shape.sliding_window for layer in found]
        follow = functools.partial(
            _follow, mask, inputs.shape[1], min((w for w in windows if w), default=None)
        )
        held = _held(cache, found[0].layer_idx)
        _check_rows(inputs, held)
        begins, read = held is None or held.state is None, None if cache is None else follow(held, cache)
        answer = forward(self, *args, **kwargs)
        if cache is None:  # the model may have made one
            made = answer.values() if isinstance(answer, dict) else answer
            values = made if isinstance(answer, (dict, tuple)) else ()
            cache = next((x for x in values if isinstance(x, caches)), None)
            read = None if cache is None else follow(None, cache)
        held = _held(cache, found[0].layer_idx)
        if held is not None:
            held.read, held.plain = read, (held.plain or begins) and mask is None
        return answer

    return inner


def _check_shapes(inputs: Tensor, mask: Tensor | None, cache: Any) -> None:
    """Refuse what transformers ends on in the middle of a layer, or reads in part and without a word.

    Args:
        inputs: ids [B, T], or embeddings [B, T, C].
        mask: as it was given.
        cache: of the model, before the call.

    Raises:
        LinearizeError: there is no token.
        UnsupportedModelError: the mask is of another shape than those that are read.
    """
    rows, tokens = inputs.shape[:2]
    if tokens == 0:
        past = 0 if cache is None else int(cache.get_seq_length())
        behind = f" behind the {past:,} that the cache holds" if past else ""
        raise LinearizeError(
            f"there is no token to read{behind}: give generate() the whole text that the cache has read and what "
            "follows it, and forward() at least one new token"
        )
    if mask is None or mask.dim() == 4 or (mask.dim() == 2 and mask.shape[0] in (1, rows)):
        return
    raise UnsupportedModelError(
        f"an attention mask of shape {tuple(mask.shape)} for {rows} rows of {tokens} tokens; give [batch, tokens] (1 "
        "where text is, 0 on padding) or [batch, 1, queries, keys]"
    )


def _check_rows(inputs: Tensor, held: LinearizedCacheLayer | None) -> None:
    """Refuse a batch of another size than the one that the cache has read.

    Raises:
        LinearizeError: it is one.
    """
    if held is not None and held.state is not None and held.state.batch != inputs.shape[0]:
        raise LinearizeError(
            f"the cache holds the states of {held.state.batch} texts, and {inputs.shape[0]} are given; start with an "
            "empty cache, or choose or repeat its rows (batch_select_indices, batch_repeat_interleave)"
        )


def _held(cache: Any, index: int) -> LinearizedCacheLayer | None:
    """The converted cache layer of attention layer `index`, if there is one yet."""
    held = [] if cache is None else getattr(cache, "self_attention_cache", cache).layers
    layer = held[index] if 0 <= index < len(held) else None
    return layer if isinstance(layer, LinearizedCacheLayer) else None


def _follow(
    mask: Tensor | None, tokens: int, window: int | None, held: LinearizedCacheLayer | None, cache: Any
) -> Read | None:
    """Hold a mask that the caller made, or none, against what earlier calls have read.

    A state holds every text token of its document: a mask that hides one of them, or opens one that was padding, asks
    for something else. What a mask says of its own tokens the layers check, but for single ones.

    Args:
        mask: as it was given, [B, S] or [B, 1, Q, S]; None: all is text.
        tokens: Q.
        window: the shortest of the teacher's own sliding windows, or None.
        held: the cache layer of the first converted layer, before the call, or None.
        cache: of the model, before the call.

    Returns:
        What has been read after the call.

    Raises:
        UnsupportedModelError: it does.
    """
    known = None if held is None else held.read
    if mask is None:
        return None if known is None else _told(held, known, None, tokens, window)
    if mask.dim() == 2:
        known = _told(held, known, mask.to(torch.bool), tokens, window)
        if known is None or tokens > 1:
            return Read.of(mask.to(torch.bool))
        return known
    if mask.dim() != 4 or getattr(cache, "is_compileable", False):
        return known  # generate itself makes the masks of static caches
    past = 0 if held is None else int(held.get_seq_length())
    first, last, texts = text_rows(mask, tokens, past)
    if known is None:
        known = Read.of(torch.ones(1, past, dtype=torch.bool, device=first.device)) if past else None
    if known is not None and known.padding.shape[0] in (1, first.shape[0]):
        fits = ~texts | known.agrees(first[:, :past])
        if tokens > 1:
            fits |= ~first[:, :past].any(1)  # another document begins
        elif window is not None and past >= window:
            fits &= ~first[:, : past + 1 - window].any(1)
        _refuse_unless(fits)
    read = Read.of(last)
    # rows that had no text in this call are taken at their word from here on
    return Read(read.padding, torch.where(texts, read.texts, -1), read.tokens)


def _told(
    held: LinearizedCacheLayer | None,
    known: Read | None,
    mask: Tensor | None,
    tokens: int,
    window: int | None,
) -> Read | None:
    """The same of a mask [B, S] true where text, or of none; what was known stays, if it fits.

    Away from the CPU only the first of the tokens that come one at a time waits for the device.
    """
    if held is None or held.state is None or (known is None and not held.plain):
        return known
    device = known.padding.device if mask is None and known is not None else getattr(mask, "device", None)
    if tokens == 1 and known is not None and known.compared and str(device) != "cpu":
        return known
    past = int(held.get_seq_length())
    if not past or (mask is not None and mask.shape[1] < past + tokens):
        return known
    if known is None:
        assert mask is not None
        known = Read.of(torch.ones(1, past, dtype=torch.bool, device=mask.device))
    if mask is None:
        fits = (known.texts == known.tokens) | (known.texts < 0)
    elif known.padding.shape[0] not in (1, mask.shape[0]):
        return known
    else:
        fits = known.counts(mask[:, :past])
        if tokens > 1 and window is None:
            fits |= ~mask[:, :past].any(1)  # another document begins
    _refuse_unless(fits)
    return replace(known, compared=tokens == 1)


def _refuse_unless(fits: Tensor) -> None:
    if not bool(fits.all()):
        raise UnsupportedModelError(
            "an attention mask (none shows every token) that hides tokens of earlier calls, or shows padding among "
            f"them: {REMEDY}"
        )
