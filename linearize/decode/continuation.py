"""What follows a prefix in `generate`: what can be asked for, and how transformers is told that the rest is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.decode.arguments import cache_name
from linearize.decode.choice import request
from linearize.decode.prefix import Prefix
from linearize.decode.reach import check_reach
from linearize.decode.reader import UNEQUAL
from linearize.errors import LinearizeError
from linearize.memory import Room

WANTED = 4
"""Ids, mask and what transformers makes of them at every token, each as long as the text."""


def check_continuation(
    model: Any, tokenizer: Any, prefix: Prefix, mask: Tensor, options: dict[str, Any]
) -> None:
    """Refuse what cannot go on from a prefix.

    Args:
        model, tokenizer: which are to go on.
        prefix: what has been read.
        mask: [B, T] of the prompts, 0 on padding.
        options: of `model.generate`.

    Raises:
        LinearizeError: another model, prompts of unequal length, options that look at the tokens that have been read or
            that need caches of their own, or more tokens than the model's positions reach.
    """
    prefix.check(model, tokenizer)
    if not bool(mask.all()):
        raise LinearizeError(UNEQUAL)
    asked, problems = request(model, prefix.tokens + mask.shape[1], options)
    if asked is None:
        raise LinearizeError(
            f"{'; '.join(problems)}: behind a state there is greedy decoding and sampling with temperature, top_k and "
            "top_p alone, since the tokens themselves are not kept; leave it out, or generate without a state"
        )
    check_reach(model, prefix.tokens + mask.shape[1] + asked.tokens)


def behind(model: Any, prefix: Prefix, ids: Tensor) -> dict[str, Any]:
    """Arguments of `model.generate` for prompts [B, T] behind a prefix that `check_continuation` has let through.

    transformers wants the ids of the whole text, counts them and passes over those that the cache has read. So the last
    token stands for each of them: nothing that `check_continuation` lets through looks at them.

    Raises:
        LinearizeError: so many ids do not fit into memory, where the state does.
    """
    room = Room(
        ids.device,
        f"the ids of {prefix.tokens:,} tokens, which transformers wants behind a state,",
        "go on from a state of a shorter text, or on a GPU, where they are not made",
    )
    room.take(WANTED * ids.shape[0] * (prefix.tokens + ids.shape[1]) * ids.element_size())
    read = ids.new_full((ids.shape[0], prefix.tokens), prefix.last)
    whole = torch.cat([read, ids], 1)
    return {
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        cache_name(model): prefix.checked_cache(model, ids.shape[0]),
    }
