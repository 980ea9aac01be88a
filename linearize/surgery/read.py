"""What earlier calls have read into a cache: which of its tokens are text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Read:
    """Which of a cache's tokens are text, in memory that does not grow: rows of text behind padding have two numbers.

    Attributes:
        padding: [B] tokens before the first that is text.
        texts: [B] tokens that are text; -1: nobody knows.
        tokens: in all; those that came later one at a time are not counted.
        compared: whether a later single token's mask has been held against this.
    """

    padding: Tensor
    texts: Tensor
    tokens: int
    compared: bool = False

    @classmethod
    def of(cls, rows: Tensor) -> Read:
        """What [B, S] true-where-text says."""
        return cls(rows.to(torch.int8).argmax(1), rows.sum(1), rows.shape[1])

    def agrees(self, seen: Tensor) -> Tensor:
        """[B] whether [B, S] true-where-seen shows just the text; rows with padding elsewhere pass unchecked."""
        place = torch.arange(self.tokens, device=seen.device)
        padding, texts = self.padding.to(seen.device), self.texts.to(seen.device)
        same = (seen[:, : self.tokens] == (place >= padding[:, None])).all(1)
        return same | (padding + texts != self.tokens)

    def counts(self, seen: Tensor) -> Tensor:
        """[B] whether [B, S] true-where-text tells as many tokens of text behind as much padding."""
        other = Read.of(seen[:, : self.tokens])
        padding, texts = self.padding.to(seen.device), self.texts.to(seen.device)
        return (other.padding == padding) & (other.texts == texts) | (texts < 0)

    def cut(self, tokens: int) -> Read:
        """The same of the first tokens alone."""
        if tokens >= self.tokens:
            return self
        plain = self.padding + self.texts == self.tokens
        texts = torch.where(plain & (self.padding < tokens), tokens - self.padding, -1)
        return Read(self.padding, texts, tokens)

    def select(self, indices: Tensor) -> Read:
        """The same of some rows."""
        if self.padding.shape[0] == 1:
            return self
        indices = indices.to(self.padding.device)
        return Read(self.padding[indices], self.texts[indices], self.tokens, self.compared)

    def repeat(self, repeats: int) -> Read:
        """The same of each row repeated."""
        if self.padding.shape[0] == 1:
            return self
        padding, texts = (x.repeat_interleave(repeats, 0) for x in (self.padding, self.texts))
        return Read(padding, texts, self.tokens, self.compared)
