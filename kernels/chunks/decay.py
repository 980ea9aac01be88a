"""Products of decays inside a chunk, by halving: every exponent is a sum of log decays, so no factor exceeds one.

A chunk is a block of two halves, each a block of two smaller halves, down to single tokens. Between a key in the
first half of a block and a query in its second half lies the middle: the decay from key to query is the decay from
key to middle times that from middle to query, two factors at most one, and all such pairs are one matrix product.
(The textbook form, exp(G_t) against exp(-G_s), overflows in float32 where decays are strong.) Sums are built from the
small blocks up and never subtracted, so a weak decay beside a strong one keeps its digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decay:
    """Decays inside chunks of C tokens; X is F, V, or 1 for one decay a head.

    Attributes:
        levels: for halves of h = 1, 2, 4, ... C / 2 tokens, the decay from the middle of a block to each reader in its
            second half, and from each writer in its first half to the middle; both [..., C / 2h, h, X].
        from_start: [..., C, X], from the chunk's start to each reader.
        to_end: [..., C, X], from each writer to the chunk's end.
        whole: [..., X], over the chunk.
        read_before: whether a token reads the state as it was before its own decay and key.
    """

    levels: list[tuple[Tensor, Tensor]]
    from_start: Tensor
    to_end: Tensor
    whole: Tensor
    read_before: bool


def make_decay(log_decay: Tensor, *, read_before: bool = False) -> Decay:
    """Decays of chunks.

    Args:
        log_decay: [..., C, X], at most zero, C a power of two.
        read_before: whether token t reads the state before its own decay.
    """
    total = log_decay[..., None, :]  # [..., blocks, 1, X]; the other two [..., blocks, tokens of a block, X]
    after = torch.zeros_like(total)
    upto = after if read_before else total
    levels = []
    while total.shape[-3] > 1:
        (upto_1, upto_2), (after_1, after_2), (total_1, total_2) = map(_pairs, (upto, after, total))
        levels.append((upto_2.exp(), after_1.exp()))
        upto = torch.cat([upto_1, upto_2 + total_1], -2)
        after = torch.cat([after_1 + total_2, after_2], -2)
        total = total_1 + total_2
    upto, after, total = upto[..., 0, :, :], after[..., 0, :, :], total[..., 0, 0, :]
    return Decay(levels, upto.exp(), after.exp(), total.exp(), read_before)


def decayed_products(q: Tensor, k: Tensor, decay: Decay) -> Tensor:
    """Every q . diag(decay from key to query) k of a chunk, zero for keys after the query.

    Args:
        q: [..., C, G, F].
        k: [..., C, F].
        decay: over F, or one for all (X = 1).

    Returns:
        [..., C G, C]: rows in the order (token, query).
    """
    if decay.from_start.shape[-1] == 1:
        return (q.flatten(-3, -2) @ k.mT) * head_decays(decay).repeat_interleave(q.shape[-2], -2)
    own = torch.zeros_like(q[..., :1]) if decay.read_before else (q * k[..., None, :]).sum(-1, keepdim=True)
    lows = []
    for reader, writer in decay.levels:
        sizes = reader.shape[-3:-1]
        second = _halves(q, -3, sizes)[1] * reader[..., None, :]
        first = _halves(k, -2, sizes)[0] * writer
        lows.append(second.flatten(-3, -2) @ first.mT)
    return _assemble(own, lows)


def head_decays(decay: Decay) -> Tensor:
    """Decays of one head from every token to every later one [..., C, C], zero for earlier ones (X = 1)."""
    own = (torch.zeros_like if decay.read_before else torch.ones_like)(decay.from_start[..., None])
    return _assemble(own, [reader * writer.mT for reader, writer in decay.levels])


def decayed_values(weights: Tensor, v: Tensor, decay: Decay) -> Tensor:
    """Weighted sums of values that decay one by one (X = V) on the way from their token to the reader.

    Args:
        weights: [..., C G, C], rows in the order (token, query).
        v: [..., C, V].

    Returns:
        [..., C G, V].
    """
    chunk = v.shape[-2]
    group = weights.shape[-2] // chunk
    sums = weights.unflatten(-2, (chunk, group)).diagonal(dim1=-3, dim2=-1).mT  # [..., C, G]
    sums = sums[..., None] * v[..., None, :]  # [..., blocks, rows of a block, V]
    if decay.read_before:
        sums = torch.zeros_like(sums)
    for reader, writer in decay.levels:
        blocks, half = reader.shape[-3:-1]
        pairs = weights.unflatten(-2, (blocks, 2, half * group)).unflatten(-1, (blocks, 2, half))
        low = pairs[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        added = low @ (_halves(v, -2, (blocks, half))[0] * writer)
        first, second = _pairs(sums)
        sums = torch.cat([first, second + added * reader.repeat_interleave(group, -2)], -2)
    return sums[..., 0, :, :]


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second half of every block of twice the size: [..., n, rows, X] -> two of [..., n / 2, rows, X]."""
    first, second = x.unflatten(-3, (-1, 2)).unbind(-3)
    return first, second


def _halves(x: Tensor, dim: int, sizes: torch.Size | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Halves of the blocks that tokens along `dim` fall into: [.., C, ..] -> two of [.., blocks, half, ..]."""
    blocks, half = sizes
    first, second = x.unflatten(dim, (blocks, 2, half)).unbind(dim - 1)
    return first, second


def _assemble(own: Tensor, lows: list[Tensor]) -> Tensor:
    """Lower triangles [..., rows, C] from the diagonal [..., C, rows of a token, 1] and each level's lower left."""
    weights = own
    for low in lows:
        first, second = _pairs(weights)
        weights = torch.cat([torch.cat([first, torch.zeros_like(low)], -1), torch.cat([low, second], -1)], -2)
    return weights[..., 0, :, :]
