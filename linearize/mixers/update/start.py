"""A learned state that every text begins with, for rules that are linear in their state (state tuning).

With a normalizer it is NTK-Attention's pair of Z and k, what a prefix without end comes to (Liang et al. 2024, arXiv
2406.14036); users of RWKV call it state tuning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linearize.mixers.base import Partial, fill, running, wide
from linearize.mixers.state import State


class LearnedStart(nn.Module):
    """S_0 [M, F, V], zero at the start, and n_0 = exp(w) [M, F] where the rule sums its weights.

    The rules keep R_t = S_t - D_t S_0 instead of S_t, D_t what has decayed since the document began. R starts from zero
    as kernels, caches and document borders have it, and obeys the rule's own recurrence:

    - additive, S_t = D S_{t-1} + k v^T: the same of R.
    - delta, S_t = (I - beta k k^T) D S_{t-1} + beta k v^T: of R with v - S_0^T D_t k for v.
    - generalized delta, S_t = (D + b a^T) S_{t-1} + k v^T: of R with a further b (S_0^T D_{t-1} a)^T, which is a
      smaller value where b = -k, and a write of its own elsewhere.

    What D_t S_0 answers a query with is added outside: one product with a matrix that all tokens share.

    Args:
        heads, feature_dim, value_dim: M, F, V.
        running_sum: whether there is an n_0.
        weight: n_0 at the start; it cannot be zero, from where nothing leads away.
    """

    def __init__(
        self, heads: int, feature_dim: int, value_dim: int, *, running_sum: bool, weight: float
    ) -> None:
        super().__init__()
        self.weight = weight
        self.sums = nn.Parameter(torch.empty(heads, feature_dim, value_dim))
        norms = nn.Parameter(torch.empty(heads, feature_dim)) if running_sum else None
        self.register_parameter("log_norms", norms)
        self.start()

    log_norms: Tensor | None

    def start(self) -> None:
        """Put the parameters at their initial values."""
        fill(self.sums, 0.0)
        if self.log_norms is not None:
            fill(self.log_norms, math.log(self.weight))

    def read(self, q: Tensor, since: Tensor | None) -> Partial:
        """What D_t S_0 and D_t n_0 hold under q [B, T, H, F], M dividing H.

        Args:
            since: log decays since each token's document began, [B, T, M] or [B, T, M, F]; None where nothing decays.
        """
        grouped = q.unflatten(2, (self.sums.shape[0], -1))
        left = None if since is None else since.exp()
        if left is not None and left.dim() == 4:
            grouped, left = grouped * left.to(q.dtype)[:, :, :, None], None
        found = wide(torch.einsum("btmgf,mfv->btmgv", grouped, self.sums.to(q.dtype)))
        total = None
        if self.log_norms is not None:
            total = wide(torch.einsum("btmgf,mf->btmg", grouped, self.log_norms.exp().to(q.dtype)))
        if left is not None:
            found = found * left.to(found.dtype)[..., None, None]
            total = None if total is None else total * left.to(total.dtype)[..., None]
        return Partial(found.flatten(2, 3), None if total is None else total.flatten(2, 3))

    def added(self, partial: Partial, q: Tensor, since: Tensor | None, *, weights: bool = False) -> Partial:
        """A rule's answer from R with what S_0 adds; `weights` are of keys, to which it adds nothing."""
        own = self.read(q, since)
        total = partial.denominator
        if total is not None and own.denominator is not None:
            total = total + own.denominator.to(total.dtype)
        return Partial(partial.numerator if weights else partial.numerator + own.numerator, total)


def kept_since(log_decay: Tensor | None, docs: Tensor, state: State) -> Tensor | None:
    """The log decays since each token's document began, behind those of a state, which then has the last one's."""
    if log_decay is None:
        return None
    found = running(log_decay, docs, state["since"])
    state.write({"since": found[:, -1].to(state["since"].dtype)})
    return found
