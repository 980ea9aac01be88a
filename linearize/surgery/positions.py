"""Positions of left-padded rows that come without: transformers would count the padding in front of a text.

A model whose positions are relative (RoPE) answers the same whatever number its first token has, but a feature map that
sees rotated queries and keys does not. So the padding in front is left out of the count where the model's own answer
stays as it is.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


def left_positions(model: Any, mask: Tensor, tokens: int, past: int | Tensor) -> Tensor | None:
    """Positions [B, T] of the new tokens, padding in front not counted, or None: the model's own are as good.

    Whether there is padding in front is asked of the device, but for compiled calls, where the answer is always made.

    Args:
        model: a converted base model.
        mask: [B, S], 0 on padding, S = past + T.
        tokens: T.
        past: tokens of earlier calls.

    Warns:
        UserWarning: once, where the model's positions are absolute, so that it needs to be given the right ones.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not bool((mask[:, :1] == 0).any()):
        return None
    if not is_relative(model):
        if not compiling and vars(model).setdefault("_linearize_warned", model) is model:
            vars(model)["_linearize_warned"] = None
            warnings.warn(
                f"left padding without position_ids: {type(model).__name__} takes positions as they are, so its "
                "padding counts as text in front; give position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)",
                stacklevel=3,
            )
        return None
    in_front = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    place = torch.arange(tokens, device=mask.device) + past
    return (place - in_front).clamp_min(0)


def layers(model: Any) -> list[Any]:
    """The converted attention modules of a base model, found once."""
    from linearize.surgery.attention import LinearizedAttention

    found = vars(model).get("_linearize_layers")
    if found is None:
        found = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
        vars(model)["_linearize_layers"] = found
    return found


def is_relative(model: Any) -> bool:
    """Whether a base model knows positions by rotations in its attention alone, not by vectors added to its tokens."""
    known = vars(model).get("_linearize_relative")
    if known is None:
        known = vars(model)["_linearize_relative"] = _rotates(model) and not _adds(model)
    return known


def _rotates(model: Any) -> bool:
    found = layers(model)
    handed = any(layer.mixer.shape.rotary != "none" for layer in found)
    # some families rotate inside the attention, by a table that it holds
    return handed or any(x.dim() == 2 for layer in found for x in layer.buffers(recurse=False))


def _adds(model: Any) -> bool:
    """Whether there is a table of vectors beside that of the tokens, outside attention."""
    tokens = model.get_input_embeddings()
    inside = {id(module) for layer in layers(model) for module in layer.modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, nn.Embedding) and module.num_embeddings != tokens.num_embeddings:
            return True
        held = [*module.buffers(recurse=False), *(x for x in vars(module).values() if isinstance(x, Tensor))]
        if any(x.dim() >= 2 and x.shape[-1] == tokens.embedding_dim for x in held):
            return True
    return False
