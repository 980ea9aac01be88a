"""Tokens that could be recalled, against all others (Zoology, Arora et al. 2023, arXiv 2312.04927, section 3).

A token is a hit when the pair (token before it, token) has stood earlier in the same window: a model that remembers
its context can look it up. The paper also asks that the pair be rare in the training text; that needs the text, so
here every repeated pair counts, and the distance to its last occurrence says whether a short window would have held it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distances(windows: Tensor) -> Tensor:
    """Tokens back to where the same pair last ended, for every token but the first of each window; 0 = never before.

    Args:
        windows: int64 [N, T].

    Returns:
        int64 [N, T - 1].
    """
    found = torch.zeros(len(windows), windows.shape[1] - 1, dtype=torch.int64)
    for row, ids in enumerate(windows.tolist()):
        last: dict[tuple[int, int], int] = {}
        for position in range(1, len(ids)):
            pair = (ids[position - 1], ids[position])
            if pair in last:
                found[row, position - 1] = position - last[pair]
            last[pair] = position
    return found


def buckets(length: int, first: int = 64) -> list[tuple[int, int]]:
    """Ranges [from, to) that double: 0-64, 64-128, 128-256, ..., until `length` is covered."""
    made, low, high = [], 0, first
    while low < length:
        made.append((low, high))
        low, high = high, 2 * high
    return made


def beyond(length: int) -> tuple[int, int] | None:
    """All that lies behind a window of 64 tokens, which is what conversions keep; None in windows hardly longer."""
    return (64, length) if length > 128 else None


def name(bucket: tuple[int, int]) -> str:
    """As rows write it: "64-128"."""
    return f"{bucket[0]}-{bucket[1]}"
