"""Attention transfer on weights (Hedgehog, Zhang et al. 2024, arXiv 2402.04347, eq. 4).

Cross-entropy of the student's attention, per query n: ``-sum_i a_ni log ahat_ni``, a the teacher's softmax weights,
ahat the student's. It has the gradient of KL(a || ahat).

Limitations: costs O(T^2) time, whatever the mixer; memory is O(T), because query rows go in blocks and each block's
gradient is taken before the next begins. Defined only for mixers that have weights (sums of values with factors
>= 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.objectives.base import OBJECTIVES, BlockObjective, Call, take_gradient
from linearize.objectives.blocks import weight_blocks

SMALLEST = 1e-12
"""Student weights are clamped here before the logarithm; below it they give no gradient."""


@OBJECTIVES.register("attention_weights")
class AttentionWeights(BlockObjective):
    """Cross-entropy of the teacher's weights to the student's, mean over valid queries, heads, sequences."""

    def backward(self, call: Call, scale: float) -> Tensor:
        batch, tokens, heads = call.q.shape[:3]
        queries = call.q.new_tensor(float(batch * tokens), dtype=torch.float32)
        if call.valid is not None:
            queries = call.valid.sum().clamp_min(1).to(torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=call.q.device)
        with torch.enable_grad():
            for teacher, student, counts in weight_blocks(call):
                entropy = -(teacher * student.clamp_min(SMALLEST).log()).sum(dim=-1)  # [B, H, R]
                if counts is not None:
                    entropy = torch.where(counts, entropy, 0.0)
                loss = entropy.sum() / (queries * heads)
                with torch.autocast(call.q.device.type, enabled=False):
                    take_gradient(scale * loss)
                total = total + loss.detach()
        return total
