"""Several steps of the delta rule a token, plain or gated (DeltaProduct, Siems et al. 2025, arXiv 2502.10297)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import LayerShape, fill, product, put
from linearize.mixers.low_rank import LowRank
from linearize.mixers.options import WIDEST, number
from linearize.mixers.statistics import Statistics
from linearize.mixers.update import UPDATES, Stream
from linearize.mixers.update.delta import Delta


@UPDATES.register("delta_product")
class DeltaProduct(Delta):
    """S_t = A_n ... A_1 diag(a_t) S_{t-1} and what each step writes, A_j = I - beta_j k_j k_j^T; o_t = scale S_t^T q_t.

    One step turns or erases along one direction, n of them along n: a product of Householder transformations, which
    tracks states that a single one cannot. k_1 and v_1 are the layer's own; those of later steps are the same plus
    low-rank functions of the hidden state, zero at the start, when all steps write one value under one key and n
    strengths of 1 - (1 - b)^(1/n) are one of b: the rule starts as `delta`. On kernels a token is n tokens in a row, of
    which the last is read, so the rule costs n times `delta`.

    Limitations: the papers project keys and values of every step by full matrices of their own, which a teacher does
    not have; what later steps add to values belongs to no key, and is not in the weights that objectives look at.
    """

    @dataclass
    class Config(Delta.Config):
        steps: int = number(2, least=1, most=8)
        """n."""
        rank: int = number(64, least=1, most=WIDEST)
        """Width between W1 [D, rank] and W2 of what later steps add to keys and values."""
        reflects: bool = False
        """Strengths up to 2 instead of 1, with which a step can reflect: eigenvalues down to -1."""

    def make(self, shape: LayerShape) -> None:
        super().make(shape)
        self.most = 2.0 if self.config.reflects else 1.0
        self.steps, model_dim = self.config.steps, shape.hidden_dim()
        self.beta_weight = nn.Parameter(torch.empty(model_dim, self.steps * self.heads))
        self.register_parameter("beta_bias", self.bias(self.steps, self.heads))
        self.later: LowRank | None = None
        if self.steps > 1:
            width = self.feature_dim + self.value_dim
            later = (self.steps - 1) * self.heads
            self.later = LowRank(model_dim, self.config.rank, later, width, tanh=False)

    def runs(self) -> dict[str, int]:
        return {"beta_weight": self.steps, "later.up": self.steps - 1, "later.base": self.steps - 1}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._put_strength(torch.tensor(float(self.config.beta_bias)).sigmoid().expand(self.heads), fill)
        if self.later is not None:
            self.later.start(0.0)

    def calibrate(self, statistics: Statistics) -> None:
        """As `delta`: the strength of all steps together from the entropy of the teacher's attention."""
        self._put_strength(statistics.shared(statistics.strength, self.heads), put)

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        return []  # its strengths are steps first, so that heads cannot choose theirs

    def _put_strength(self, whole: Tensor, write: Any) -> None:
        """[M] strengths of n equal steps."""
        if self.beta_bias is None:
            return
        each = -torch.expm1(torch.log1p(-whole.double()) / self.steps)
        write(self.beta_bias, (each / self.most).logit().to(self.beta_bias)[None])

    def _terms(self, stream: Stream) -> tuple[Stream, Tensor, Tensor, Tensor]:
        assert stream.hidden is not None
        dtype, steps = stream.k.dtype, self.steps
        logits = product(stream.hidden, self.beta_weight).unflatten(-1, (steps, self.heads))
        beta = self.most * self._biased(logits).sigmoid()
        beta = beta * stream.valid[..., None, None].to(dtype)
        k, v = (x[:, :, None].expand(-1, -1, steps, -1, -1) for x in (stream.k, stream.v))
        if self.later is not None:
            more = self.later(stream.hidden).unflatten(2, (steps - 1, self.heads))
            k = k + self._behind_first(more[..., : self.feature_dim])
            v = v if stream.weights else v + self._behind_first(more[..., self.feature_dim :])
        k, q, v = F.normalize(k, dim=-1).flatten(1, 2), self._query(stream), v.flatten(1, 2)
        decay = stream.log_decay
        each = replace(
            stream,
            v=v,
            docs=stream.docs.repeat_interleave(steps, 1),
            valid=stream.valid.repeat_interleave(steps, 1),
            log_decay=None if decay is None else self._alone(decay, 0),
        )
        return each, self._alone(q, steps - 1), k, beta.flatten(1, 2)

    # by `where` and not by padding, which torch's partitioner never makes again: it would keep what has been padded for
    # backward, in float32 and n times as long

    def _alone(self, x: Tensor, step: int) -> Tensor:
        """[B, T, ...] in one step of each token, zero in the others: [B, n T, ...]."""
        return torch.where(self._is(step, x.dim() + 1, x), x[:, :, None], 0.0).flatten(1, 2)

    def _behind_first(self, later: Tensor) -> Tensor:
        """[B, T, n - 1, M, ...] behind a first step of zeros: [B, T, n, M, ...]."""
        made: Tensor | float = 0.0
        for step in range(1, self.steps):
            made = torch.where(self._is(step, later.dim(), later), later[:, :, step - 1 : step], made)
        assert isinstance(made, Tensor), "one step has no later ones"
        return made

    def _is(self, step: int, dims: int, like: Tensor) -> Tensor:
        """Whether a step is this one, [n] along the third of so many dimensions."""
        return (torch.arange(self.steps, device=like.device) == step).view(-1, *[1] * (dims - 3))
