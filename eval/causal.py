"""Whether a model predicts a token from those before it alone: scores of one that does not are of another question."""

from __future__ import annotations

from typing import Any

import torch

from linearize.decode.limits import learned_positions
from linearize.errors import UnsupportedModelError
from linearize.mixers.offloaded import device_of

TOKENS = 32
SAME = 1e-3
"""Of the largest logit: rounding, where mixtures of experts sort tokens otherwise. What looks ahead differs by more."""


def check_causal(name: str, model: Any) -> None:
    """Refuse a model whose predictions depend on the tokens behind them, as an encoder's do: BERT not set to decode.

    Args:
        name: as the user wrote it, for the message.
        model: of transformers, in evaluation mode.

    Raises:
        UnsupportedModelError: it looks ahead.
    """
    tokens, device = min(TOKENS, learned_positions(model) or TOKENS), device_of(model)
    half, vocabulary = tokens // 2, model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(tokens, device=device) * 7 + 3)[None] % vocabulary
    other = ids.clone()
    other[:, half:] = (ids[:, half:] + vocabulary // 2) % vocabulary
    with torch.no_grad():
        one, two = (model(input_ids=x, use_cache=False).logits[:, :half].float() for x in (ids, other))
    apart, size = float((one - two).abs().max()), float(one.abs().max())
    if apart > SAME * size:
        raise UnsupportedModelError(
            f"{name}: not causal: what {type(model).__name__} says of a token depends on those behind it (by "
            f"{apart:.2g}, logits reach {size:.2g}), so perplexities and answers would mean nothing; give a decoder, "
            "or, where the family can be one, a checkpoint whose config.json says so (is_decoder)"
        )
