"""Matrix orientation, stage 1 of MOHAWK (Bick et al. 2024, arXiv 2408.10189, section 4.1).

A layer without its values is a matrix that mixes tokens, M [T, T]: softmax weights for the teacher, and for the
student what its rule does to values, since every rule is linear in them: ``||M_teacher - M_student||_F`` asks for no
weights of one sign, so it serves delta rules and unnormalized mixers too.

Limitations: an output gate or norm, a group norm in the place of the normalizer, and a convolution of the values act
channel by channel and are no part of M. Costs O(T^2) time, twice where a composition shows its matrix column by column:
the norm's gradient needs the whole norm first. Memory is O(T), see `mixers.shown`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.objectives import matrices
from linearize.objectives.base import OBJECTIVES, BlockObjective, Call, take_gradient


@OBJECTIVES.register("mixing_matrix")
class MixingMatrix(BlockObjective):
    """Frobenius norm of the difference of the mixing matrices, over valid query rows, mean over heads and sequences."""

    def backward(self, call: Call, scale: float) -> Tensor:
        terms = matrices.terms(call, "squares")
        squares: Tensor | None = None
        if len(terms) > 1:
            with torch.no_grad():
                for term in terms:
                    part = _squares(term(), call.valid)
                    squares = part if squares is None else squares + part
        total = squares
        with torch.enable_grad():
            for term in terms:
                part = _squares(term(), call.valid)
                total = part.detach() if squares is None else squares
                # d sqrt(s) = ds / (2 sqrt(s)); equal matrices are the minimum, where nothing pulls
                half = torch.where(
                    total > 0, 0.5 * total.clamp_min(torch.finfo(total.dtype).tiny).rsqrt(), 0.0
                )
                with torch.autocast(call.q.device.type, enabled=False):
                    take_gradient(scale * (half * part).mean())
        return call.q.new_zeros((), dtype=torch.float32) if total is None else total.sqrt().mean()


def _squares(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Summed squares [B, H] of rows [B, T, H]."""
    return (rows if valid is None else torch.where(valid[..., None], rows, 0.0)).sum(dim=1)
