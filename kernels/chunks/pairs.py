"""Products of all pairs of tokens in a chunk under one decay for every dimension, by halving.

A chunk is a block of two halves, each a block of two smaller halves, down to single tokens. Between a key in the
first half of a block and a query in its second half lies the middle: the decay from key to query is the decay from
key to middle times that from middle to query, two factors at most one, and all such pairs are one matrix product.
(The textbook form, exp(G_t) against exp(-G_s), overflows in float32 where decays are strong; clamping it loses pairs.)
The gradients are the same sums the other way round, as safe, and only the inputs are kept for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.kernels.chunks.decay import Decay


def decayed_products(q: Tensor, k: Tensor, decay: Decay) -> Tensor:
    """Every q . diag(decay from key to query) k of a chunk, zero for keys after the query.

    Args:
        q: [..., C, G, F], C a power of two.
        k: [..., C, F].
        decay: over F, or one for all (X = 1).

    Returns:
        [..., C G, C]: rows in the order (token, query).
    """
    if decay.log_decay.shape[-1] == 1:
        return (q.flatten(-3, -2) @ k.mT) * decay.between.repeat_interleave(q.shape[-2], -2)
    return _Products.apply(q, k, decay.log_decay, decay.read_before).flatten(-3, -2)


def decayed_values(weights: Tensor, v: Tensor, decay: Decay) -> Tensor:
    """Weighted sums of values that decay one by one (X = V) on the way from their token to the reader.

    Args:
        weights: [..., C G, C], rows in the order (token, query), C a power of two; those of later tokens are ignored.
        v: [..., C, V].

    Returns:
        [..., C, G, V].
    """
    grouped = weights.unflatten(-2, (v.shape[-2], -1))
    return _Values.apply(grouped, v, decay.log_decay, decay.read_before)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, log_decay: Tensor, read_before: bool) -> Tensor:
        ctx.save_for_backward(q, k, log_decay)
        ctx.read_before = read_before
        return _products(q, k, log_decay, read_before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        q, k, log_decay = ctx.saved_tensors
        return *_sums(weights, q, k, log_decay, ctx.read_before), None


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, log_decay: Tensor, read_before: bool) -> Tensor:
        ctx.save_for_backward(weights, v, log_decay)
        ctx.read_before = read_before
        readers = v.new_zeros(*weights.shape[:-1], v.shape[-1])
        return _sums(weights, readers, v, log_decay, read_before)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        weights, v, log_decay = ctx.saved_tensors
        _, for_v, for_decay = _sums(weights, out, v, log_decay, ctx.read_before)
        return _products(out, v, log_decay, ctx.read_before), for_v, for_decay, None


def _products(q: Tensor, k: Tensor, log_decay: Tensor, read_before: bool) -> Tensor:
    """Weights [..., C, G, C] of `decayed_products`."""
    weights = q.new_zeros(*q.shape[:-1], k.shape[-2])
    if not read_before:
        weights.diagonal(dim1=-3, dim2=-1).copy_((q * k[..., None, :]).sum(-1).mT)
    for reader, writer in _levels(log_decay, read_before):
        second = _halves(q, reader, -3)[1] * reader[..., None, :]
        first = _halves(k, reader, -2)[0] * writer
        low = second.flatten(-3, -2) @ first.mT
        _lower(weights, reader).copy_(low.unflatten(-2, second.shape[-3:-1]))
    return weights


def _sums(
    weights: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, read_before: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(weights * decayed_products(q, k)): for q [..., C, G, F], k [..., C, F] and log_decay."""
    for_q, for_k = torch.zeros_like(q), torch.zeros_like(k)
    for reader, writer in _levels(log_decay, read_before):
        (_, q_second), (k_first, _) = _halves(q, reader, -3), _halves(k, reader, -2)
        low = _lower(weights, reader).flatten(-3, -2)
        second = (low @ (k_first * writer)).unflatten(-2, q_second.shape[-3:-1])
        first = low.mT @ (q_second * reader[..., None, :]).flatten(-3, -2)
        _halves(for_q, reader, -3)[1].addcmul_(second, reader[..., None, :])
        _halves(for_k, reader, -2)[0].addcmul_(first, writer)
    # the decay at j acts on pairs of a reader from j (or behind j) on and a writer before j
    readers = (q * for_q).sum(-2)
    readers = F.pad(readers[..., 1:, :], (0, 0, 0, 1)) if read_before else readers
    for_decay = (readers - k * for_k).flip(-2).cumsum(-2).flip(-2)
    if not read_before:
        own = weights.diagonal(dim1=-3, dim2=-1).mT[..., None]  # [..., C, G, 1]
        for_q.addcmul_(own, k[..., None, :])
        for_k.add_((own * q).sum(-2))
    return for_q, for_k, for_decay


def _levels(log_decay: Tensor, read_before: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """For halves of h = 1, 2, 4, ... C / 2 tokens: decays from the middle to readers, and from writers to the middle.

    Both [..., C / 2h, h, X], of the second and the first halves; they change when the next level is asked for.
    """
    total = log_decay.exp()[..., None, :]  # of every block
    writer = torch.ones_like(total[..., 0, :])
    reader = writer.clone() if read_before else total[..., 0, :].clone()
    half = 1
    while total.shape[-3] > 1:
        total_1, total_2 = total.unflatten(-3, (-1, 2)).unbind(-3)
        level = (
            reader.unflatten(-2, (-1, 2, half))[..., 1, :, :],
            writer.unflatten(-2, (-1, 2, half))[..., 0, :, :],
        )
        yield level
        level[0].mul_(total_1)
        level[1].mul_(total_2)
        total, half = total_1 * total_2, 2 * half


def _halves(x: Tensor, level: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Views of a level's first and second halves along the tokens `dim`: [.., C, ..] -> [.., C / 2h, h, ..]."""
    first, second = x.unflatten(dim, (-1, 2, level.shape[-2])).unbind(dim - 1)
    return first, second


def _lower(weights: Tensor, level: Tensor) -> Tensor:
    """View of what a level's second halves see of the first: [..., C, G, C] -> [..., C / 2h, h, G, h]."""
    half = level.shape[-2]
    pairs = weights.unflatten(-1, (-1, 2, half)).unflatten(-5, (-1, 2, half))
    return pairs[..., :, 1, :, :, :, 0, :].diagonal(dim1=-5, dim2=-2).movedim(-1, -4)
