"""What a mixer needs of transformers' attention masks: which tokens are padding, and where packed documents begin.

A mask that says more than that, or something else, is refused: no state can obey it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.errors import UnsupportedModelError

HIDDEN = -1e3
"""What is added to a score to hide a key is at most this: masks come with -1e4, -1e9, -inf and the lowest number."""
ROWS = 256
"""Query rows that are compared at once, so that checking a mask takes less memory than the mask."""
REMEDY = (
    "a recurrent state cannot obey it; give padding as attention_mask [batch, tokens], packed documents as "
    "position_ids that begin again at 0 or as a causal block-diagonal mask, and texts that share a prefix as rows "
    "of their own"
)


@dataclass(frozen=True)
class Reading:
    """What a mask says about the new tokens of a call.

    Attributes:
        valid: [B, T] bool, false on padding, or None: there is none.
        starts: [B, T] bool, true where a packed document begins, or None: there is one.
        gaps: whether padding stands behind a token, where it is not harmless; None: nobody has looked.
    """

    valid: Tensor | None
    starts: Tensor | None
    gaps: bool | None


PLAIN = Reading(None, None, False)
"""Nothing but text."""


def read_mask(
    mask: Any,
    batch: int,
    tokens: int,
    offset: int | Tensor | None = 0,
    *,
    window: int | None = None,
    chunk: int | None = None,
    carries: bool = False,
    trusted: bool = False,
) -> Reading:
    """Padding and document starts of the new tokens, read off the mask that the softmax layer would use.

    The mask is the ground truth for both: transformers builds it from `attention_mask` and, for packed sequences,
    from `position_ids`, and the teacher obeys it. A mask of several tokens is checked as a whole, which waits for the
    device once; all layers that get the same mask share what was found. A single token's is not, so that decoding
    waits for nothing.

    Args:
        mask: None, [B, 1, Q, S] bool (true = visible) or float (0 = visible), or [B, S] (flash attention).
        batch, tokens: B and Q.
        offset: column of the first new token, on the host or as a [] tensor; None where no new token can be padding.
        window: tokens that the softmax layer sees, its own included, or None for all.
        chunk: tokens in a chunk that the softmax layer sees alone, or None: then a single token begins no document.
        carries: the call reads or leaves a state.
        trusted: masks like this one have been checked before, and no token is padding: nothing waits for the device.

    Raises:
        UnsupportedModelError: a flex-attention BlockMask, whose entries cannot be read; a mask for each head; weights
            added to scores; keys seen or hidden that no state can hold apart.
    """
    if mask is None or offset is None:
        return PLAIN
    if not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            f"attention masks of type {type(mask).__name__} (flex attention) cannot be read by converted layers; "
            "use model.set_attn_implementation('sdpa')"
        )
    if tokens == 1:
        valid = _single(mask, batch, offset)
        return Reading(valid, None if chunk is None else valid & _alone(mask, batch), True)
    if torch.compiler.is_compiling():
        found = _read(mask, batch, tokens, offset, window)
        return Reading(None, found.starts, False) if trusted else found
    offset = int(offset)
    # nobody counts what is written into a tensor made under inference_mode
    version = None if mask.is_inference() else mask._version
    key = (version, batch, tokens, offset, window, carries, trusted)
    known = getattr(mask, "linearize_reading", None)
    if version is not None and known is not None and known[0] == key:
        return known[1]
    if trusted:
        found = Reading(None, _read(mask, batch, tokens, offset, window).starts, False)
    else:
        found = _checked(mask, batch, tokens, offset, window, carries)
    mask.linearize_reading = (key, found)  # type: ignore[attr-defined]  # lives as long as the mask
    return found


def _single(mask: Tensor, batch: int, offset: int | Tensor) -> Tensor:
    """Whether the only new token is text, [B, 1]: its own key is visible to itself."""
    if mask.dim() == 2:
        return mask[:, -1:].to(torch.bool).expand(batch, -1)
    _check_shape(mask, batch, 1)
    row = mask[:, 0, 0]
    own = row[:, offset : offset + 1] if isinstance(offset, int) else row.index_select(1, offset.reshape(1))
    return (own if own.dtype == torch.bool else own > HIDDEN).expand(batch, -1)


def _alone(mask: Tensor, batch: int) -> Tensor:
    """Whether the only new token sees one key, its own, as the first of a chunk does, [B, 1]."""
    if mask.dim() == 2:
        return torch.zeros(batch, 1, dtype=torch.bool, device=mask.device)
    return (_visible(mask, batch, 1)[:, 0].sum(-1, keepdim=True) == 1).expand(batch, -1)


def _check_shape(mask: Tensor, batch: int, tokens: int) -> None:
    """Refuse shapes that are no [B, 1, Q, S].

    Raises:
        UnsupportedModelError: naming the shape.
    """
    shape = tuple(mask.shape)
    if mask.dim() != 4 or shape[0] not in (1, batch) or shape[2] not in (1, tokens):
        raise UnsupportedModelError(
            f"an attention mask of shape {shape} for {batch} rows of {tokens} tokens; converted layers read "
            "[batch, tokens] and [batch, 1, queries, keys]"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UnsupportedModelError(
            f"an attention mask [batch, 1, queries, keys] of {mask.dtype}; give it as bool, true where a key is seen"
        )


def _visible(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """[B or 1, Q, S] bool of a mask with four dimensions."""
    _check_shape(mask, batch, tokens)
    rows = mask[:, 0].expand(-1, tokens, -1)
    return rows if mask.dtype == torch.bool else rows > HIDDEN


def _read(mask: Tensor, batch: int, tokens: int, offset: int | Tensor, window: int | None) -> Reading:
    """A mask's reading, taken at its word."""
    if mask.dim() == 2:
        return Reading(mask[:, -tokens:].to(torch.bool).expand(batch, -1), None, None)
    visible = _visible(mask, batch, tokens)
    place = torch.arange(tokens, device=mask.device)
    valid = _valid(visible, place + offset)
    order = torch.where(valid, place, -1).cummax(1).values
    before = torch.nn.functional.pad(order[:, :-1], (1, 0), value=-1)
    sees_before = visible.gather(2, (before + offset).clamp_min(0)[..., None])[..., 0]
    apart = (before >= 0) & ~sees_before
    if window is not None:
        # a key that the window hides says nothing about documents
        apart &= place - before < window
    elif not (isinstance(offset, int) and offset == 0):
        past = torch.arange(visible.shape[-1], device=mask.device) < offset
        # where nothing was carried, or padding alone, closing its document does no harm
        apart |= (before < 0) & ~(_first(visible, valid) & past).any(-1)[:, None]
    return Reading(valid.expand(batch, -1), (valid & apart).expand(batch, -1), None)


def text_rows(mask: Tensor, tokens: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the first and the last text token of a call see, each [B, past + T] bool, and whether there is one, [B].

    Args:
        mask: [B, 1, Q, S], S at least past + T.

    Raises:
        UnsupportedModelError: another shape.
    """
    visible = _visible(mask, mask.shape[0], tokens)
    columns = past + tokens
    if visible.shape[-1] < columns:
        raise UnsupportedModelError(
            f"an attention mask of shape {tuple(mask.shape)} for {tokens} tokens behind {past} others; its last number "
            f"must be {columns}"
        )
    valid = _valid(visible, torch.arange(tokens, device=mask.device) + past)
    last = _first(visible.flip(1), valid.flip(1))
    return _first(visible, valid)[:, :columns], last[:, :columns], valid.any(1)


def _valid(visible: Tensor, own: Tensor) -> Tensor:
    """Which tokens [B, Q] are text: they see themselves, in columns `own` [Q]."""
    # rows of padding that see everything, as some masks have it lest a softmax be empty
    opened = visible.all(-1) & (own < visible.shape[-1] - 1)
    return visible.gather(2, own[None, :, None].expand(visible.shape[0], -1, -1))[..., 0] & ~opened


def _first(visible: Tensor, rows: Tensor) -> Tensor:
    """What the first of the `rows` [B, Q] sees, [B, S]; the first row of all where there is none."""
    first = rows.to(torch.int8).argmax(1)
    return visible[torch.arange(visible.shape[0], device=visible.device), first]


def _checked(
    mask: Tensor, batch: int, tokens: int, offset: int, window: int | None, carries: bool
) -> Reading:
    """A mask's reading, if the mask is what the reading says."""
    found = _read(mask, batch, tokens, offset, window)
    assert found.valid is not None
    flags = {"gaps": _gaps(found.valid, offset, carries)}
    if mask.dim() == 4:
        if mask.shape[1] > 1 and mask.stride(1):
            flags["heads"] = (mask != mask[:, :1]).any()
        if mask.dtype != torch.bool:
            flags["weights"] = ~((mask == 0) | (mask <= HIDDEN)).all()
        flags["keys"] = _differs(_visible(mask, batch, tokens), found, offset, window)
    said = dict(zip(flags, torch.stack(list(flags.values())).tolist(), strict=True))
    if said.get("heads"):
        raise UnsupportedModelError(f"an attention mask that differs from head to head: {REMEDY}")
    if said.get("weights"):
        raise UnsupportedModelError(
            f"an attention mask with values between 0 (seen) and {HIDDEN:.0f} (hidden), which weigh keys: {REMEDY}"
        )
    if said.get("keys"):
        reach = "" if window is None else f" inside this layer's window of {window}"
        raise UnsupportedModelError(
            "an attention mask under which tokens do not see every earlier token of their own document"
            f"{reach} and no other (a shared prefix, a tree, a part read in both directions, another window): {REMEDY}"
        )
    return Reading(found.valid, found.starts, said["gaps"])


def _gaps(valid: Tensor, offset: int, carries: bool) -> Tensor:
    """[] bool: padding behind a token; without a state only where another token follows."""
    if carries and offset:
        return (~valid).any()
    seen = valid.cumsum(1)
    behind = ~valid & (seen > 0)
    return (behind if carries else behind & (seen < seen[:, -1:])).any()


def _differs(visible: Tensor, found: Reading, offset: int, window: int | None) -> Tensor:
    """[] bool: a token sees, or does not see, what it should by the reading.

    Keys of earlier calls are seen by all tokens of the open document or by none.
    """
    assert found.valid is not None and found.starts is not None
    rows = visible.shape[0]
    valid, starts = found.valid[:rows], found.starts[:rows]
    tokens, columns = valid.shape[1], visible.shape[2]
    docs = starts.to(torch.int64).cumsum(1)
    place = torch.arange(columns, device=visible.device)
    own = torch.arange(tokens, device=visible.device) + offset
    past = place < offset
    fresh = (place >= offset) & (place < own[-1] + 1)
    new = (place - offset).clamp(0, tokens - 1)
    open_rows = valid & (docs == 0)
    carried = _first(visible, open_rows) & past & open_rows.any(1)[:, None]
    key_valid = torch.where(fresh, valid[:, new], carried)
    key_docs = torch.where(fresh, docs[:, new], 0)
    opened = visible.all(-1)
    wrong = torch.zeros((), dtype=torch.bool, device=visible.device)
    for first in range(0, tokens, ROWS):
        cut = slice(first, first + ROWS)
        seen, age = visible[:, cut], own[cut, None] - place
        allowed = (age >= 0) & key_valid[:, None]
        near = allowed if window is None else allowed & (age < window)
        expected = near & (key_docs[:, None] == docs[:, cut, None])
        text = valid[:, cut, None]
        # padding may see what it likes of the text; what it answers is nobody's
        loose = seen & fresh & ~allowed & ~opened[:, cut, None]
        wrong |= torch.where(text, seen != expected, loose).any()
    return wrong
