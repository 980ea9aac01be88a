"""Sequences cut into chunks: padding, who sees whom across documents, and the loop over states between chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """N chunks of C tokens (the last one padded with zeros), and the documents in them.

    Attributes:
        tokens: T, before padding.
        chunk: C, a power of two.
        count: N, at least one.
        visible: [B, N, C, C] bool, the second token is not after the first and of the same document.
        entering: [B, N, C] bool, the token belongs to the document that was open before its chunk.
        open: [B, N, C] bool, the token belongs to the document that is open at its chunk's end.
        kept: [B, N] bool, one document was open before the chunk and is at its end.
    """

    tokens: int
    chunk: int
    count: int
    visible: Tensor
    entering: Tensor
    open: Tensor
    kept: Tensor

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, M, ...] -> [B, N, M, C, ...], zeros appended."""
        extra = self.count * self.chunk - self.tokens
        padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra)) if extra else x
        return padded.unflatten(1, (self.count, self.chunk)).transpose(2, 3)

    def cut_grouped(self, q: Tensor, heads: int) -> Tensor:
        """[B, T, H, F] -> [B, N, M, C, G, F] for M = `heads` heads of the state and G = H / M queries to each."""
        return self.cut(q.unflatten(2, (heads, -1)))

    def join(self, x: Tensor) -> Tensor:
        """[B, N, M, C, G, V] -> [B, T, H, V], the padding gone."""
        return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, : self.tokens]


def cut_documents(docs: Tensor, chunk: int) -> Blocks:
    """Cut a batch of sequences into chunks.

    Args:
        docs: [B, T] document numbers, non-decreasing; the carried state belongs to document 0.
        chunk: the most tokens in a chunk, a power of two.

    Raises:
        ValueError: `chunk` is no power of two.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk is {chunk}; it is halved again and again: give a power of two, such as 64")
    tokens = docs.shape[1]
    chunk = min(chunk, 1 << max(tokens - 1, 0).bit_length())
    count = max(1, -(-tokens // chunk))
    last = docs[:, -1:] if tokens else docs.new_zeros(len(docs), 1)
    docs = torch.cat([docs, last.expand(-1, count * chunk - tokens)], 1).unflatten(1, (count, chunk))
    ends = docs[:, :, -1]
    before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=docs.device).tril()
    return Blocks(
        tokens=tokens,
        chunk=chunk,
        count=count,
        visible=causal & (docs[..., None] == docs[..., None, :]),
        entering=docs == before[..., None],
        open=docs == ends[..., None],
        kept=before == ends,
    )


def scan(advance: Callable[..., Tensor], state: Tensor, *pieces: Tensor) -> tuple[Tensor, Tensor]:
    """Run a recurrence over chunks.

    Args:
        advance: state and one slice of every piece -> next state.
        state: [B, ...] before the first chunk.
        pieces: [B, N, ...].

    Returns:
        the states that enter the chunks [B, N, ...], and the one that leaves the last.
    """
    entering = []
    for slices in zip(*(piece.unbind(1) for piece in pieces), strict=True):
        entering.append(state)
        state = advance(state, *slices)
    return torch.stack(entering, 1), state
