"""Attention transfer on outputs (LoLCATs, Zhang et al. 2024, arXiv 2410.10254, eq. 7).

Each layer's mixer learns to give what its softmax gave. The teacher's output goes on to the next layer, so every
layer sees the teacher's hidden states, and the layers' losses are independent of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize import across
from linearize.objectives.base import OBJECTIVES, Call, OutputObjective
from linearize.objectives.layer import masked_mean, widen


@OBJECTIVES.register("attention_output")
class AttentionOutput(OutputObjective):
    """Mean squared error of the per-head outputs before o_proj, over all B, T, H, V."""

    def loss(self, call: Call, student: Tensor) -> Tensor:
        error = widen(student) - widen(call.teacher)
        return masked_mean(error.square().mean(dim=(2, 3)), call.valid)


@OBJECTIVES.register("attention_output_projected")
class AttentionOutputProjected(OutputObjective):
    """Mean squared error after o_proj, over all B, T, D: an error counts by what it does downstream."""

    projects = True

    def loss(self, call: Call, student: Tensor) -> Tensor:
        with torch.no_grad():
            target = widen(call.project(call.teacher))
        error = widen(call.project(student)) - target
        return masked_mean(error.square().mean(dim=2), call.valid)


@OBJECTIVES.register("attention_output_relative")
class AttentionOutputRelative(OutputObjective):
    """Squared error over the teacher's squared norm, ||y - t||^2 / ||t||^2, both summed over the batch.

    Every layer weighs the same, whatever the size of its outputs; with the plain error late layers dominate.
    """

    def loss(self, call: Call, student: Tensor) -> Tensor:
        target = widen(call.teacher)
        error = masked_mean((widen(student) - target).square().mean(dim=(2, 3)), call.valid)
        norm = masked_mean(target.square().mean(dim=(2, 3)), call.valid)
        processes = across.active()
        norm = norm if processes is None else processes.mean(norm)
        return error / norm.clamp_min(torch.finfo(norm.dtype).tiny)
