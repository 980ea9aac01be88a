"""The softmax over the runs of keys that a window's queries see, on kernels or in torch, as one partial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

from linearize.kernels.window import Seen, add_sink, merge, window_chunk
from linearize.kernels.window.merge import Normalized, merge_normalized
from linearize.mixers.base import Partial


class Scores(TypedDict):
    """How products of queries and keys become scores."""

    scaling: float
    softcap: float | None


@dataclass
class Asked:
    """Queries [B, T, H, K], the keys that they see, and a logit [H] that takes weight without a value, or None."""

    q: Tensor
    seen: Seen
    sink: Tensor | None = None


def softmax(
    asked: Sequence[Asked],
    k: Tensor,
    v: Tensor,
    alone: bool,
    *,
    kernel: bool,
    scaling: float,
    softcap: float | None,
) -> Partial:
    """One softmax over the keys of all that is `asked`, which are disjoint for each query.

    Args:
        k, v: [B, P + T, N, K or V].
        alone: see `Window.alone`.
        kernel: run Triton's.
    """
    scores: Scores = {"scaling": scaling, "softcap": softcap}
    if kernel:
        from linearize.kernels.window.operator import window_triton

        made: list[Normalized] = [
            window_triton(one.q, k, v, one.seen, sink=one.sink, wants_top=not alone, **scores)
            for one in asked
        ]
        whole = made[0]
        for more in made[1:]:
            whole = merge_normalized(whole, more)
        return normalized(whole, alone)
    weighted = None
    for one in asked:
        part = window_chunk(one.q, k, v, one.seen, **scores)
        part = part if one.sink is None else add_sink(part, one.sink)
        weighted = part if weighted is None else merge(weighted, part)
    assert weighted is not None, "nothing is asked"
    return Partial(*weighted)


def normalized(made: Normalized, alone: bool) -> Partial:
    """A kernel's answer; sums of weights only where another branch is to share them."""
    out, log_sum, top = made
    if alone or top is None:
        return Partial(out, None)
    return Partial(out, (log_sum - top).exp(), top, divided=True)
