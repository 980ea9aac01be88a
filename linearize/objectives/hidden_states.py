"""Alignment of what each layer's attention adds to the hidden states.

Step 1 of RADLADS (Goldstein et al. 2025, arXiv 2505.03005, section 3) and, but for the factor D^(-1/2), stage 2 of
MOHAWK (Bick et al. 2024, arXiv 2408.10189, section 4.2). The teacher's output goes on to the next layer, as in
attention transfer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.objectives.base import OBJECTIVES, Call, OutputObjective
from linearize.objectives.layer import masked_mean, widen


@OBJECTIVES.register("hidden_alignment")
class HiddenAlignment(OutputObjective):
    """Per token ``||o_T - o_S||_2 D^(-1/2)`` after o_proj, a norm and not its square, mean over tokens.

    Of the same differences `attention_output_projected` takes the mean square. There a token pulls in proportion to
    its error, so a few outliers rule; here every token pulls alike, however large its error.
    """

    projects = True

    def loss(self, call: Call, student: Tensor) -> Tensor:
        with torch.no_grad():
            target = widen(call.project(call.teacher))
        error = widen(call.project(student)) - target
        return masked_mean(torch.linalg.vector_norm(error, dim=2) * error.shape[2] ** -0.5, call.valid)
