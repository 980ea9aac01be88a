"""Matrix orientation, stage 1 of MOHAWK (Bick et al. 2024, arXiv 2408.10189, section 4.1).

A layer without its values is a matrix that mixes tokens, M [T, T]: softmax weights for the teacher, and for the
student what its rule does to values, since every rule is linear in them: ``||M_teacher - M_student||_F`` asks for no
weights of one sign, so it serves delta rules and unnormalized mixers too.

Limitations: an output gate or norm, a group norm in the place of the normalizer, and a convolution of the values act
channel by channel and are no part of M. Costs O(T^2) time, twice: the norm's gradient needs the whole norm before the
first block of rows. Memory is O(T) for ungated additive rules; a rule with a gate or a delta rule shows its matrix by
its definition, a loop over tokens that holds all of it: give such a stage short sequences (`data: {length: 256}`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.objectives.base import OBJECTIVES, BlockObjective, Call, take_gradient
from linearize.objectives.blocks import row_blocks, weight_blocks


@OBJECTIVES.register("mixing_matrix")
class MixingMatrix(BlockObjective):
    """Frobenius norm of the difference of the mixing matrices, over valid query rows, mean over heads and sequences."""

    def backward(self, call: Call, scale: float) -> Tensor:
        blocks = row_blocks(call)
        squares: Tensor | None = None
        if len(blocks) > 1:
            with torch.no_grad():
                squares = torch.stack([_squares(*block) for block in weight_blocks(call)]).sum(dim=0)
        total = squares
        with torch.enable_grad():
            for block in weight_blocks(call):
                part = _squares(*block)
                total = part.detach() if squares is None else squares
                # d sqrt(s) = ds / (2 sqrt(s)); equal matrices are the minimum, where nothing pulls
                half = torch.where(
                    total > 0, 0.5 * total.clamp_min(torch.finfo(total.dtype).tiny).rsqrt(), 0.0
                )
                with torch.autocast(call.q.device.type, enabled=False):
                    take_gradient(scale * (half * part).mean())
        assert total is not None
        return total.sqrt().mean()


def _squares(teacher: Tensor, student: Tensor, counts: Tensor | None) -> Tensor:
    """Summed squares [B, H] of a block's difference [B, H, R, T]."""
    rows = (student - teacher).square().sum(dim=-1)
    if counts is not None:
        rows = torch.where(counts, rows, 0.0)
    return rows.sum(dim=-1)
