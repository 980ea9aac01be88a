"""The masks of kept softmax layers, from positions on the device; transformers' own read the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Masks = Tensor | dict[str, Tensor]
PATTERNS = ("full_attention", "sliding_attention")
"""Kinds of layers, as `config.layer_types` names them, whose masks are known here."""


def patterns(config: Any) -> list[str] | str:
    """The kinds of masks that a model takes: a list where it takes one for each kind of layer, else its only one.

    As `transformers.masking_utils.create_masks_for_generate` decides it.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return sorted(set(kinds))
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "chunked_attention" if getattr(config, "attention_chunk_size", None) else "full_attention"


def token_masks(config: Any, seen: Tensor, now: Tensor, dtype: torch.dtype) -> Masks:
    """What tokens that come may see, in the form that the model takes.

    Args:
        config: the model's text config.
        seen: [B, S] bool, false on the prompt's padding.
        now: int64, places of the tokens: [B or 1, Q], or [] where all rows have one token at the same place.
        dtype: of the model.

    Returns:
        [B, 1, Q, S], or a dict of them by kind of layer: bool, or with the eager attention function 0 and the lowest
        number.
    """
    now = now if now.dim() else now[None, None]
    age = now[..., None] - torch.arange(seen.shape[1], device=seen.device)
    visible = seen[:, None] & (age >= 0)

    def mask(kind: str) -> Tensor:
        near = visible & (age < config.sliding_window) if kind == "sliding_attention" else visible
        near = near[:, None]
        if config._attn_implementation != "eager":
            return near
        return torch.zeros_like(near, dtype=dtype).masked_fill(~near, torch.finfo(dtype).min)

    kinds = patterns(config)
    return mask(kinds) if isinstance(kinds, str) else {kind: mask(kind) for kind in kinds}
