"""What a product of few dims can say of a teacher's attention: reduced-rank regression of pairs of tokens, per head.

Each query i and key j of one document, j at or before i, has a wanted number t_ij; sought are W_q and W_k with
(q_i W_q).(k_j W_k) near it. With G = E[q t k^T] and the second moments C_q and C_k of queries and keys over the pairs,
taken as independent, the best product of rank r is the first r terms of the SVD of C_q^-1/2 G C_k^-1/2 between
C_q^-1/2 and C_k^-1/2 (reduced-rank regression, Izenman 1975). No random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.mixers.statistics import Statistics, finite

QUERIES = 2048
"""Queries that are looked at, spread evenly."""
BLOCK = 128
"""Queries whose pairs are held at once."""
RIDGE = 0.001
"""On second moments, of their mean over the dims."""


class Seen(NamedTuple):
    """Moments over pairs of each query head, float64 [H, K, K].

    Attributes:
        queries, keys: second moments.
        scores: E[q s k^T] of the teacher's scaled scores s.
        centered: of s less its mean over the keys of a query.
        roots: of sqrt(2 n p), p the weight that the teacher's softmax gives to one of n keys.
    """

    queries: Tensor
    keys: Tensor
    scores: Tensor
    centered: Tensor
    roots: Tensor


def seen(statistics: Statistics) -> Seen:
    """The moments, from queries and keys as the recurrent branch sees them; a soft cap or a window is left out.

    Where no document has a second token there is no pair, and all of them are zero.

    Raises:
        NotFiniteError: products of queries and keys overflow; names the moment and the head.
    """
    heads, dim = statistics.q.shape[1:]
    group = heads // statistics.k.shape[1]
    zero = torch.zeros(heads, dim, dim, dtype=torch.float64, device=statistics.q.device)
    totals = [zero for _ in Seen._fields]
    count = 0
    for q, k, before in _blocks(statistics):
        k = k.repeat_interleave(group, 0)
        found = (statistics.shape.scaling * q @ k.mT).masked_fill(~before, 0.0)
        several = before.sum(1).to(q)
        mean = found.sum(2) / several
        weights = found.masked_fill(~before, -torch.inf).softmax(2)
        level = (found - mean[..., None]).masked_fill(~before, 0.0)
        roots = (2 * several[:, None] * weights).sqrt()
        made = [(several[:, None] * q).mT @ q, (before.sum(0).to(k)[:, None] * k).mT @ k]
        made += [q.mT @ (target @ k) for target in (found, level, roots)]
        totals = [total + part.double() for total, part in zip(totals, made, strict=True)]
        count += int(before.sum())
    for name, total in zip(Seen._fields, totals, strict=True):
        # no decomposition takes it, and torch's error says neither the layer nor a remedy
        finite(total, f"{statistics.where}: the mean over pairs of the teacher's {name}")
    return Seen(*(total / max(count, 1) for total in totals))


def _blocks(statistics: Statistics) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some queries [H, R, K] of one document, the keys [M, S, K] up to the last of them, and who sees whom [R, S]."""
    rows = len(statistics.q)
    every = -(-rows // QUERIES)
    begins = sorted({0, *statistics.opens.nonzero()[:, 0].tolist()})
    for begin, end in zip(begins, [*begins[1:], rows], strict=True):
        # the first query of a document has no choice
        asked = torch.arange(begin + 1, end, device=statistics.q.device)
        asked = asked[asked % every == 0]
        for some in asked.split(BLOCK) if len(asked) else ():
            last = int(some[-1]) + 1
            keys = torch.arange(begin, last, device=asked.device)
            yield (
                statistics.q[some].transpose(0, 1),
                statistics.k[begin:last].transpose(0, 1),
                keys <= some[:, None],
            )


def products(moments: Seen, wanted: Tensor, rank: int, shared: int) -> tuple[Tensor, Tensor]:
    """W_q [H, K, r] and W_k [shared, K, r] for one of the moments of `Seen`, both of one size; r = rank at most.

    Args:
        moments: of the pairs.
        wanted: [H, K, K].
        rank: 1 or more.
        shared: heads of W_k; query heads that share one meet in one system.
    """
    heads, dim = wanted.shape[:2]
    rank = min(rank, dim)
    of_keys = moments.keys.view(shared, -1, dim, dim).mean(1)
    before, behind = _power(moments.queries, -0.5), _power(of_keys, -0.5)
    whitened = before @ wanted @ behind.repeat_interleave(heads // shared, 0)
    left, sizes, right = torch.linalg.svd(whitened.reshape(shared, -1, dim), full_matrices=False)
    half = sizes[:, None, :rank].sqrt()
    of_queries = before @ (left[..., :rank] * half).reshape(heads, dim, rank)
    return of_queries, behind @ (right[:, :rank].mT * half)


def tied(moments: Seen, wanted: Tensor, rank: int) -> Tensor:
    """W [H, K, r] for queries and keys alike: the first terms of the symmetric part, those that are positive.

    Terms below a thousandth of the first are as large as that: a column of zeros would never learn.
    """
    product = _power(moments.queries, -1.0) @ wanted @ _power(moments.keys, -1.0)
    both = (moments.queries + moments.keys) / 2
    around, back = _power(both, 0.5), _power(both, -0.5)
    sizes, vectors = torch.linalg.eigh(around @ (product + product.mT) @ around / 2)
    rank = min(rank, sizes.shape[1])
    sizes, vectors = sizes[:, -rank:].flip(1), vectors[..., -rank:].flip(2)
    floor = sizes[:, :1].clamp_min(1e-12) * 1e-3
    return back @ (vectors * torch.maximum(sizes, floor).sqrt()[:, None])


def _power(matrix: Tensor, power: float) -> Tensor:
    """Of symmetric matrices [..., K, K] with a ridge."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)
    values = values + RIDGE * values.mean(-1, keepdim=True) + 1e-12
    return vectors * values.pow(power)[..., None, :] @ vectors.mT
