"""Attention transfer on weights (Hedgehog, Zhang et al. 2024, arXiv 2402.04347, eq. 4).

Cross-entropy of the student's attention, per query n: ``-sum_i a_ni log ahat_ni``, a the teacher's softmax weights,
ahat the student's. It has the gradient of KL(a || ahat).

Limitations: costs O(T^2) time, whatever the mixer; memory is O(T), see `mixers.shown`. Defined only for mixers that
have weights (sums of values with factors >= 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.objectives import matrices
from linearize.objectives.base import OBJECTIVES, BlockObjective, Call, take_gradient


@OBJECTIVES.register("attention_weights")
class AttentionWeights(BlockObjective):
    """Cross-entropy of the teacher's weights to the student's, mean over valid queries, heads, sequences.

    Student weights below 1e-12 count as 1e-12 and give no gradient.
    """

    def backward(self, call: Call, scale: float) -> Tensor:
        batch, tokens, heads = call.q.shape[:3]
        total: Tensor | None = None
        with torch.enable_grad():
            for term in matrices.terms(call, "cross_entropy"):
                rows = term()
                count = rows.new_full((), batch * tokens)
                if call.valid is not None:
                    rows = torch.where(call.valid[..., None], rows, 0.0)
                    count = call.valid.sum().clamp_min(1).to(rows.dtype)
                loss = rows.sum() / (count * heads)
                with torch.autocast(call.q.device.type, enabled=False):
                    take_gradient(scale * loss)
                total = loss.detach() if total is None else total + loss.detach()
        return call.q.new_zeros((), dtype=torch.float32) if total is None else total
