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


class Cached:
    """A model that remembers what it was shown: a batch of prompts, then token after token.

    One whose forward takes no cache of transformers (RWKV-4 has a state of its own, GPT-1 none) reads all of it again
    for every token: the same answers, slowly.

    Args:
        model: in evaluation mode.
        autocast: dtype for torch.autocast on the model's device, or None.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.device = device_of(model)
        self.autocast = autocast
        known = inspect.signature(model.forward).parameters
        # the second name is that of transformers before 5.24
        self._name = next((name for name in ("cache", "past_key_values") if name in known), None)
        self.cache: Any = None if self._name is None else DynamicCache(config=model.config)
        self._read: Tensor | None = None
        self._fewer = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, V], float32, behind the last of some more tokens [B, n]."""
        return self._run(ids, self._fewer)[:, -1]

    def every(self, ids: Tensor) -> Tensor:
        """Logits [B, n, V] behind each of them."""
        return self._run(ids, {})

    def together(self) -> Any:
        """A context for many calls: autocast casts the weights once, and not for every token again."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def copy(self) -> Cached:
        """Another one that remembers the same; the mixers that converted layers point at stay the model's."""
        other = copy.copy(self)
        if self.cache is None:
            return other
        mixers = {id(layer.mixer): layer.mixer for layer in surgery.converted(self.model)}
        other.cache = copy.deepcopy(self.cache, mixers)
        return other

    @torch.no_grad()
    def _run(self, ids: Tensor, options: dict[str, int]) -> Tensor:
        ids, new = ids.to(self.device), ids.shape[1]
        given: dict[str, Any] = {self._name: self.cache, "use_cache": True} if self._name else {}
        if self._name is None:
            given["use_cache"] = False
            self._read = ids = ids if self._read is None else torch.cat([self._read, ids], 1)
        with self.together():
            return self.model(input_ids=ids, **given, **options).logits[:, -new:].float()


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
    read = Cached(model, autocast)
    with read.together():
        first = read(torch.tensor([prompt.ids for prompt in prompts]))
        candidates = [_likelihood(read, prompts, number, first) for number in range(len(prompts[0].answers))]
        written = [first.argmax(-1)]
        while len(written) < new_tokens:
            written.append(read(written[-1][:, None]).argmax(-1))
    texts = tokenizer.batch_decode(torch.stack(written, 1), skip_special_tokens=True)
    return [
        Answer(text, [found[row] for found in candidates], [len(candidate) for candidate in prompt.answers])
        for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
    ]


def _likelihood(read: Cached, prompts: Sequence[Prompt], number: int, first: Tensor) -> list[float]:
    """Summed log-probability of each prompt's candidate of that number."""
    rows = [prompt.answers[number] for prompt in prompts]
    longest = max(map(len, rows))
    # padded on the right, where a causal model does not look
    ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=first.device)
    own = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows], device=first.device)
    logits = first[:, None]
    if longest > 1:
        logits = torch.cat([logits, read.copy().every(ids[:, :-1])], 1)
    found = F.log_softmax(logits, -1).gather(2, ids[..., None])[..., 0]
    return (found * own).sum(1).tolist()
