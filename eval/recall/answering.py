"""Answers of a model to prompts of one length: what it writes, and how likely it finds each candidate.

A batch's prompt runs once. What follows runs on copies of the cache that it left, through the same step that decoding
uses, so that a model is judged by the way in which it is used.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from linearize import surgery
from linearize.eval.recall.haystack import Prompt
from linearize.mixers.offloaded import device_of


@dataclass(frozen=True)
class Answer:
    """To one prompt.

    Attributes:
        text: what greedy decoding wrote.
        log_probs: summed over the tokens of each candidate.
        tokens: of each candidate.
    """

    text: str
    log_probs: list[float]
    tokens: list[int]


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    new_tokens: int,
    autocast: torch.dtype | None = None,
) -> list[Answer]:
    """Answers to a batch.

    Args:
        model: in evaluation mode.
        tokenizer: reads the new tokens back.
        prompts: of one length.
        new_tokens: how many are decoded.
        autocast: dtype for torch.autocast, or None.
    """
    device = device_of(model)
    context: Any = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
    with context:
        cache = DynamicCache(config=model.config)
        first = _last_logits(model, ids, cache)
        candidates = [
            _likelihood(model, prompts, number, first, cache) for number in range(len(prompts[0].answers))
        ]
        written = _decode(model, first, cache, new_tokens)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [
        Answer(text, [found[row] for found in candidates], [len(candidate) for candidate in prompt.answers])
        for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
    ]


def _last_logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits [B, V] behind the last token; of the others only where the model makes them in any case."""
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **fewer).logits[:, -1].float()


def _likelihood(model: Any, prompts: Sequence[Prompt], number: int, first: Tensor, cache: Any) -> list[float]:
    """Summed log-probability of each prompt's candidate of that number."""
    rows = [prompt.answers[number] for prompt in prompts]
    longest = max(map(len, rows))
    # padded on the right, where a causal model does not look
    ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=first.device)
    own = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows], device=first.device)
    logits = first[:, None]
    if longest > 1:
        more = model(input_ids=ids[:, :-1], past_key_values=copied(model, cache), use_cache=True).logits
        logits = torch.cat([logits, more.float()], 1)
    found = F.log_softmax(logits, -1).gather(2, ids[..., None])[..., 0]
    return (found * own).sum(1).tolist()


def _decode(model: Any, first: Tensor, cache: Any, new_tokens: int) -> Tensor:
    """Greedy tokens [B, new_tokens]; the cache is used up."""
    made = [first.argmax(-1)]
    while len(made) < new_tokens:
        logits = model(input_ids=made[-1][:, None], past_key_values=cache, use_cache=True).logits
        made.append(logits[:, -1].argmax(-1))
    return torch.stack(made, 1)


def copied(model: Any, cache: Any) -> Any:
    """A cache of the same content; the mixers that converted layers point at stay the model's."""
    return copy.deepcopy(cache, {id(layer.mixer): layer.mixer for layer in surgery.converted(model)})
