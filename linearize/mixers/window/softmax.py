"""The softmax over the runs of keys that a window's queries see, on kernels or in torch, as one partial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.window import Seen, add_sink, merge, window_chunk
from linearize.kernels.window.merge import Normalized, merge_normalized
from linearize.kernels.window.reference import Weighted
from linearize.mixers.base import Partial


class Scores(TypedDict):
    """How products of queries and keys become scores."""

    scaling: float
    softcap: float | None


@dataclass
class Asked:
    """Queries and what they see.

    Attributes:
        q: [B, T, H, K].
        seen: their keys.
        sink: [H], a logit that takes weight without a value, or None.
        only: [B, T] bool, the queries that count, or None for all.
    """

    q: Tensor
    seen: Seen
    sink: Tensor | None = None
    only: Tensor | None = None

    def kept(self, made: Normalized) -> Normalized:
        """A kernel's answer for the queries that count."""
        if self.only is None:
            return made
        out, log_sum, top = made
        only = self.only[..., None]
        top = None if top is None else top.masked_fill(~only, 0.0)
        return out.masked_fill(~only[..., None], 0.0), log_sum.masked_fill(~only, -torch.inf), top

    def summed(self, made: Weighted) -> Weighted:
        """The same of sums, with the sink."""
        if self.only is not None:
            numerator, denominator, top = made
            only = self.only[..., None]
            numerator = numerator.masked_fill(~only[..., None], 0.0)
            made = (numerator, denominator.masked_fill(~only, 0.0), top.masked_fill(~only, 0.0))
        return made if self.sink is None else add_sink(made, self.sink)


def softmax(
    asked: Sequence[Asked],
    k: Tensor,
    v: Tensor,
    alone: bool,
    *,
    fits: bool,
    scaling: float,
    softcap: float | None,
) -> Partial:
    """One softmax over the keys of all that is `asked`, which are disjoint for each query.

    Args:
        k, v: [B, P + T, N, K or V].
        alone: see `Window.alone`.
        fits: Triton's kernels take heads so wide; otherwise they run where they are asked for by name.
    """
    scores: Scores = {"scaling": scaling, "softcap": softcap}
    if dispatch.use_triton(asked[0].q, k, v) and (fits or not dispatch.automatic()):
        from linearize.kernels.window.operator import window_triton

        made: list[Normalized] = [
            one.kept(window_triton(one.q, k, v, one.seen, sink=one.sink, wants_top=not alone, **scores))
            for one in asked
        ]
        whole = made[0]
        for more in made[1:]:
            whole = merge_normalized(whole, more)
        return normalized(whole, alone)
    weighted = None
    for one in asked:
        part = one.summed(window_chunk(one.q, k, v, one.seen, **scores))
        weighted = part if weighted is None else merge(weighted, part)
    assert weighted is not None, "nothing is asked"
    return Partial(*weighted)


def normalized(made: Normalized, alone: bool) -> Partial:
    """A kernel's answer; sums of weights only where another branch is to share them."""
    out, log_sum, top = made
    if alone or top is None:
        return Partial(out, None)
    return Partial(out, (log_sum - top).exp(), top, divided=True)
