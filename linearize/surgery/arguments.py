"""What may reach a converted layer's attention function beside q, k, v and a mask, and what each argument means.

One table for the probe and for every real call: an argument is honored with the value that the mixer was built with, or
known not to change the answer, or refused by name. transformers hands a forward's keyword arguments down to the
attention function, so most of the second kind belong to other parts of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linearize.mixers import LayerShape
from linearize.surgery import handed_on

_POSITIONS = "q and k come rotated; documents are read off the mask"
_CACHE = "keys and values have been through the cache already"
_OUTPUTS = "says what the model returns"
_LENGTHS = "lengths of packed documents, whose borders are read off the mask"
_LOSS = "read by the loss"

WITHOUT_EFFECT: dict[str, str] = {
    "position_ids": _POSITIONS,
    "position_embeddings": _POSITIONS,
    "cache_position": _POSITIONS,
    "seq_idx": _LENGTHS,
    "cu_seq_lens_q": _LENGTHS,
    "cu_seq_lens_k": _LENGTHS,
    "max_length_q": _LENGTHS,
    "max_length_k": _LENGTHS,
    "cache": _CACHE,
    "past_key_values": _CACHE,
    "past_key_value": _CACHE,
    "layer_past": _CACHE,
    "use_cache": _CACHE,
    "layer_idx": _CACHE,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "output_router_logits": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "logits_to_keep": _OUTPUTS,
    "num_logits_to_keep": _OUTPUTS,
    "num_items_in_batch": _LOSS,
    "labels": _LOSS,
    "shift_labels": _LOSS,
    "token_type_ids": "what it changes stands in the mask",
    "mm_token_type_ids": "what it changes stands in the mask",
    "dropout": "regularizes training, off in evaluation",
    "linearize_frame": "what a converted module's forward tells its own attention function",
    handed_on.NAME: "values that converted layers mix with theirs, and a layer that stays softmax does not read",
    "deterministic": "says which kernel computes the same numbers",
}
"""Argument -> why a mixer may ignore it."""

CHANGES_RESULT: dict[str, str] = {
    "s_aux": "attention sinks that are more than a logit for each head",
    "sinks": "learned attention sinks",
    "position_bias": "a position bias",
    "alibi": "ALiBi",
    "head_mask": "a mask of heads",
    "indices": "keys chosen by an index",
    "block_indices": "blocks of keys chosen by an index",
}
"""Arguments that no mixer computes, in words."""


def extra(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are neither without effect nor None; `scaling` and its like and sinks [H] left out."""
    honored = ["scaling", "softcap", "sliding_window", "is_causal"]
    if getattr(arguments.get("s_aux"), "ndim", None) == 1:
        honored.append("s_aux")
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and name not in honored and name not in WITHOUT_EFFECT
    }


def refusal(arguments: Mapping[str, Any], *, tokens: int, mask: Any) -> str | None:
    """Why a call of the attention function cannot be answered by a mixer, or None.

    Args:
        arguments: the call's keyword arguments.
        tokens: queries.
        mask: the call's mask, or None.
    """
    for name, value in extra(arguments).items():
        meaning = CHANGES_RESULT.get(name)
        if meaning is not None:
            return (
                f"uses {meaning}, which no mixer computes yet (argument '{name}' of its attention function)"
            )
        return (
            f"hands its attention function the argument '{name}' ({_short(value)}), which linearize does not know; "
            "it could change the result"
        )
    if arguments.get("is_causal") is False and mask is None and tokens > 1:
        return "not causal (is_causal=False); only decoders can be converted"
    return None


def heads_refusal(mask: Any) -> str | None:
    """Why a mask [B, 1, Q, S] cannot be read as padding and documents: it differs from head to head, or None."""
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] != 1:
        return (
            f"its attention mask has {mask.shape[1]} heads, so it is more than padding and packed documents, "
            "which is all that a mixer honors"
        )
    return None


def bias_refusal(mask: Any) -> str | None:
    """Why an additive mask is no mask but a bias: it has values between visible (0) and hidden (large), or None."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.is_meta:
        return None
    between = (mask != 0) & (mask > -1e3)
    if not bool(between.any()):
        return None
    value = mask[between].flatten()[0].item()
    return f"adds a bias to its scores through the attention mask (a value of {value:.3g}), which no mixer computes"


def numbers(arguments: Mapping[str, Any], key_dim: int) -> dict[str, Any]:
    """`scaling`, `softcap` and `sliding_window` of a call, as plain numbers.

    Raises:
        ValueError: one of them is no plain number; the message names it.
    """
    scaling = arguments.get("scaling")
    found = {
        "scaling": key_dim**-0.5 if scaling is None else scaling,
        "softcap": arguments.get("softcap"),
        "sliding_window": arguments.get("sliding_window"),
    }
    for name, value in found.items():
        kinds = (int,) if name == "sliding_window" else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ValueError(f"its {name} is no plain number ({_short(value)})")
    return {**found, "scaling": float(found["scaling"])}


def changed(arguments: Mapping[str, Any], shape: LayerShape) -> str | None:
    """Which number of a call differs from the one that the mixer was built with, or None."""
    for name, value in numbers(arguments, shape.key_dim).items():
        built = getattr(shape, name)
        same = value == built if value is None or built is None else math.isclose(value, built, rel_tol=1e-6)
        if not same:
            return (
                f"is called with {name}={value!r}, but was converted with {name}={built!r}; convert the model "
                "with the config that it runs with"
            )
    return None


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (int, float, str, bool, torch.dtype)):
        return repr(value)[:40]
    return f"a {type(value).__name__}"
