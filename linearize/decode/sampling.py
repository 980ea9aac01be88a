"""How the next token is chosen, on the device: greedy, or plain sampling with the draws that transformers makes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def draw(probabilities: Tensor) -> Tensor:
    """A draw [B] from each of [B, V] probabilities, which need not sum to one.

    It is `torch.multinomial`'s (highest of probability / exponential noise), from torch's default generator of the
    device, without its check of the input, which would stop a CUDA graph from being captured.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_(1.0)).argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """Settings of a choice, with transformers' meaning and order.

    Attributes:
        sample: draw; else the highest score is taken and the rest is ignored.
        temperature: scores are divided by it.
        top_k: only so many highest scores stay; 0 for all.
        top_p: only the fewest tokens that hold this share of the mass stay.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """transformers' own rules.

        Raises:
            ValueError: a number is out of its range.
        """
        if self.sample:
            _ = self._warpers

    def choose(self, logits: Tensor) -> Tensor:
        """The next tokens [B] for logits [B, V]."""
        return draw(self.probabilities(logits)) if self.sample else logits.float().argmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, [B, V] float32 for logits [B, V]."""
        scores = logits.float()
        for warper in self._warpers:
            scores = warper(None, scores)
        return scores.softmax(-1)

    @cached_property
    def _warpers(self) -> list[Any]:
        warpers: list[Any] = []
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers
