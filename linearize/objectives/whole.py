"""Passes that make the logits of all their tokens at once, as far as one matrix product may have so many numbers.

On a GPU a product of more than 2^32 numbers can come out wrong without a word. Seen on an H200 with torch 2.11: 32
windows of 1,024 tokens over Gemma's 262,144 entries are 2^33, and made a teacher of perplexity 22 one of 17,223, which
fewer windows at once do not. So none is asked for more than a signed 32-bit index reaches. A pass that would be larger
is told as one that does not fit into memory, which halves what goes together; a single sequence that is too long is
refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.models.unwrapped import unwrapped

MOST = 2**31 - 1
"""Logits of one pass."""
LIMITED = ("cuda",)
"""Types of devices that this holds for."""


class TooManyLogitsError(MemoryError):
    """More logits than one product may have; for `is_out_of_memory` memory that has run out."""


def sequences_at_once(model: nn.Module, length: int, device: torch.device) -> int | None:
    """How many sequences of a length may make their logits in one pass; None: any number."""
    if device.type not in LIMITED:
        return None
    return MOST // (length * _vocabulary(model))


def whole_logits(model: nn.Module, input_ids: Tensor, **given: Any) -> Tensor:
    """Logits [B, T, V] of a pass, in the model's dtype.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        input_ids: int64 [B, T].
        given: what else `model` takes.

    Raises:
        TooManyLogitsError: there would be more of them than one product may have.
    """
    batch, length = input_ids.shape
    most = sequences_at_once(model, length, input_ids.device)
    if most is not None and batch > most:
        raise TooManyLogitsError(
            f"{batch} x {length:,} tokens have {batch * length * _vocabulary(model):,} logits, and one product has "
            f"{MOST:,} at most"
        )
    return model(input_ids=input_ids, use_cache=False, **given).logits


def _vocabulary(model: nn.Module) -> int:
    head = unwrapped(model).get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(unwrapped(model).config.get_text_config().vocab_size if weight is None else weight.shape[0])
