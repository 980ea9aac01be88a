"""Attention shapes and what their operators must do at least: bytes moved and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.bench.case import Draw, Tensors, traffic


@dataclass(frozen=True)
class Shape:
    """q [B, T, H, D]; k and v [B, T, N, D]. Tensors are 16 bits wide."""

    batch: int
    tokens: int
    heads: int
    dim: int
    kv_heads: int

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"B={self.batch} T={self.tokens:,} H={heads} D={self.dim}"

    @property
    def rows(self) -> int:
        """Tokens times query heads, of all sequences."""
        return self.batch * self.tokens * self.heads

    def qkv(self, draw: Draw) -> Tensors:
        """q, k and v."""
        keys = (self.batch, self.tokens, self.kv_heads, self.dim)
        q = draw.normal(self.batch, self.tokens, self.heads, self.dim)
        return {"q": q, "k": draw.normal(*keys), "v": draw.normal(*keys)}

    def bytes(self, extra: float = 0) -> tuple[float, float]:
        """Forward and forward + backward.

        Args:
            extra: bytes a query row of further inputs that get gradients, such as decays.
        """
        shared = self.kv_heads / self.heads
        inputs = self.rows * (2 * self.dim * (1 + 2 * shared) + extra)
        return traffic(inputs, self.rows * 2 * self.dim)


def sized(total: int, length: int, heads: int, dim: int, kv_heads: int = 0) -> Shape:
    """`total` tokens in sequences of `length`, at least one."""
    return Shape(max(1, total // length), length, heads, dim, kv_heads or heads)


def attention_flops(
    shape: Shape, *, features: int = 0, map_dim: int = 0, window: int = 0
) -> tuple[float, float]:
    """Of window softmax and linear attention, the least of a recurrent form: chunks cost more.

    Per query row: feature maps 4 D f, state 4 F D (update and read), window 4 D w (scores and values). Backward makes
    features, states and scores again and has two products for each one forward.

    Args:
        shape: the layer.
        features: F, numbers in a feature; the state is F x D. 0: no linear part.
        map_dim: f, columns of a learned map. 0: features are given.
        window: w, keys that the softmax sees.
    """
    dim = shape.dim
    forward = 4 * dim * map_dim + 4 * features * dim + 4 * dim * window
    backward = 12 * dim * map_dim + 10 * features * dim + 10 * dim * window
    return shape.rows * forward, shape.rows * (forward + backward)
