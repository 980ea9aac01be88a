"""Softmax layers that read the keys which tokens see and nothing else, under the name by which transformers finds them.

With a mask torch's attention reads the whole buffer of keys, and transformers first repeats it for all query heads of a
key head. In place of a mask these layers are given two numbers a token, [B, 1, T, 2]: the slot where it stands, and how
many slots it sees, the newest at its turn. transformers hands on whatever has four dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from linearize.decode.masks import Masks, patterns
from linearize.errors import LinearizeError
from linearize.kernels import dispatch
from linearize.kernels.newest import newest_steps
from linearize.models.layers import head_sizes
from linearize.models.soft_cap import capped

NAME = "linearize_newest"
WIDEST = 256
"""Columns of a head that the kernel takes."""
_UNKNOWN = ("s_aux", "position_bias")
"""What some families add to scores; nothing here does."""


class UnknownScores(LinearizeError):
    """A family adds something to the scores that is not known here."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, H, T, K], key and value [B, N, S, K or V]; gives [B, T, H, V].

    Raises:
        UnknownScores: see there.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise UnknownScores(
                f"{type(module).__name__}: its attention has {name}, which sampling does not know; sample with another "
                "tool, and give the text as a file"
            )
    newest, seen = attention_mask[:, 0, :, 0], attention_mask[:, 0, :, 1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    given = query.transpose(1, 2), key, value, newest, seen
    return newest_steps(*given, scaling=scale, softcap=softcap), None


AttentionInterface.register(NAME, attend)


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """Inside, models of this text config attend in this way."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def fits(model: Any, config: Any) -> bool:
    """Whether a model's softmax layers can attend in this way, as far as can be known before they have.

    Args:
        model: of transformers.
        config: its text config.
    """
    like = next(model.parameters())
    return (
        dispatch.use_triton(like)
        and config._attn_implementation == "sdpa"
        and not capped(
            config
        )  # which sdpa does not compute: the prompt, and `generate`, would be of another model
        and bool(getattr(model, "_supports_attention_backend", False))
        and max(head_sizes(config), default=0) <= WIDEST
    )


def newest_numbers(config: Any, now: Tensor, seen: Tensor) -> Masks:
    """What layers are given in place of masks, by kind of layer where the model takes one for each.

    Args:
        config: the model's text config.
        now: int64, the slots where tokens stand: [B, T], or [] where all rows have one token in the same.
        seen: [B, T] int64, tokens of each row up to this one, in the slots up to `now`.
    """

    def numbers(kind: str) -> Tensor:
        near = seen.clamp(max=config.sliding_window) if kind == "sliding_attention" else seen
        # the rows' numbers lie side by side: no layer has to copy them
        return torch.stack([now.expand_as(near), near]).permute(1, 2, 0)[:, None]

    kinds = patterns(config)
    return numbers(kinds) if isinstance(kinds, str) else {kind: numbers(kind) for kind in kinds}
