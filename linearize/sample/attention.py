"""Attention of one token over a ring of keys, under the name by which transformers' models find it.

In place of a mask it is given two numbers a row, [B, 1, 1, 2]: the slot that was written last, and how many of the
newest slots are seen. transformers hands on whatever has four dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface

from linearize.errors import LinearizeError
from linearize.kernels.newest import newest_step

NAME = "linearize_newest"
_UNKNOWN = ("s_aux", "position_bias")
"""What some families add to scores; nothing here does."""


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
    """As transformers calls it: query [B, H, 1, K], key and value [B, N, S, K or V]; gives [B, 1, H, V].

    Raises:
        LinearizeError: the family adds something to the scores that is not known here.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise LinearizeError(
                f"{type(module).__name__}: its attention has {name}, which sampling does not know; sample with another "
                "tool, and give the text as a file"
            )
    newest, seen = attention_mask[:, 0, 0, 0], attention_mask[:, 0, 0, 1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = newest_step(query[:, :, 0], key, value, newest, seen, scaling=scale, softcap=softcap)
    return out[:, None], None


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
