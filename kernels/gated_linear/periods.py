"""What the operators share that keep a state at the end of each period: sizes, tensors, and pieces of the scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64
"""Tokens in a tile of every product."""
Some = tuple[Tensor | None, Tensor | None]
"""Sums and norms of a carried state, or their gradients."""
NAMES = ("states", "norms", "carries", "carry_norms", "spans")
"""What `Periods.states` gives, as kernels call it."""


@dataclass(frozen=True)
class Periods:
    """Sizes of one call; the state of a head is `width` x value_dim.

    Attributes:
        batch, tokens, heads, state_heads, value_dim: sizes.
        normalize: whether the sum of the weights is kept too, and divided by.
        tiles, periods: of the sequence.
        segments, per_segment: pieces of the scan over periods, and periods in each.
        wide: whether states, and what is multiplied with them, are float32.
        precision: of products of float32 operands.
    """

    batch: int
    tokens: int
    heads: int
    state_heads: int
    value_dim: int
    normalize: bool
    tiles: int
    periods: int
    segments: int
    per_segment: int
    wide: bool
    precision: str

    @property
    def width(self) -> int:
        """Features of a state."""
        raise NotImplementedError(type(self))  # pragma: no cover - every plan defines it

    @property
    def span_width(self) -> tuple[int, ...]:
        """Decays of a period's span in one head."""
        return ()

    def states(self, q: Tensor) -> list[Tensor]:
        """Empty states, norms, carries, carries of norms and spans, in the order of `NAMES`."""
        dtype = q.dtype if q.dtype == torch.bfloat16 else torch.float32
        size, pieces = (self.batch, self.state_heads), self.segments if self.segments > 1 else 0
        width = self.width if self.normalize else 0
        return [
            q.new_empty(*size, self.periods, self.width, self.value_dim, dtype=dtype),
            q.new_empty(*size, self.periods, width, dtype=torch.float32),
            q.new_empty(*size, pieces, self.width, self.value_dim, dtype=dtype),
            q.new_empty(*size, pieces, width, dtype=torch.float32),
            q.new_empty(*size, self.periods, *self.span_width, dtype=torch.float32),
        ]

    def state(self, q: Tensor) -> list[Tensor]:
        """Empty sums and norms of one state, float32."""
        size = (self.batch, self.state_heads, self.width)
        norms = size if self.normalize else (0,)
        return [
            q.new_empty(*size, self.value_dim, dtype=torch.float32),
            q.new_empty(norms, dtype=torch.float32),
        ]

    def outputs(self, q: Tensor) -> list[Tensor]:
        """Empty tensors for what the forward operator gives."""
        rows = (self.batch, self.tokens, self.heads)
        denominator = q.new_empty(rows if self.normalize else (0,), dtype=torch.float32)
        return [q.new_empty(*rows, self.value_dim), denominator, *self.state(q), *self.states(q)]

    def geometry(self) -> dict[str, int]:
        """Sizes that all kernels take."""
        return {
            "tokens": self.tokens,
            "tiles": self.tiles,
            "periods": self.periods,
            "per_segment": self.per_segment,
            "segments": self.segments,
            "V": self.value_dim,
            "C": CHUNK,
        }


def cut(tokens: int, tiles_of_period: int, segments: int, room: Callable[[], int]) -> dict[str, int]:
    """The `tiles`, `periods`, `segments` and `per_segment` of a plan.

    Args:
        tokens: of a sequence.
        tiles_of_period: tiles in a period.
        segments: of the scan, or 0 to choose.
        room: says how many times the programs of one segment fit on the device at once.
    """
    tiles, periods = -(-tokens // CHUNK), -(-tokens // (tiles_of_period * CHUNK))
    if not tiles:
        segments = 1
    elif segments == 0:
        segments = max(1, min(room(), tokens // 1024))
    per_segment = max(1, -(-periods // segments))
    segments = -(-periods // per_segment) if tiles else 1
    return {"tiles": tiles, "periods": periods, "segments": segments, "per_segment": per_segment}
