"""A learned share for each branch, per head (Infini-attention, Munkhdalai et al. 2024, arXiv 2404.07143, eq. 10).

Or per head and token, from the hidden states (as the branch gates of NSA, Yuan et al. 2025, arXiv 2502.11089, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.mixers import fits
from linearize.mixers.base import LayerShape, Part, Partial, accumulator, fill, product, put
from linearize.mixers.combine import COMBINES, SHUT, Combine, blend
from linearize.mixers.options import choice_problems, number


@COMBINES.register("sigmoid")
class Sigmoid(Combine):
    """y = g * y_window + (1 - g) * y_recurrent, each branch normalized by itself.

    g = sigmoid(b) with one b per head, or sigmoid(W x + b) with W [H, D] on the hidden state x of the query's token.
    W starts at zero, so both begin at the same g. Where a branch has seen no key, the other one takes its share.

    Raises:
        LinearizeError: ``per: token`` for a layer whose model dim is unknown.
    """

    EDGE = 0.02
    token_weight: nn.Parameter | None

    @dataclass
    class Config(Part.Config):
        per: str = "head"
        """head, or token: from the hidden states, for every head."""
        window_weight_init: float = number(0.5, above=0, below=1)
        """g at the start."""

        def problems(self) -> list[str]:
            """Rules that types alone do not express."""
            return choice_problems(per=(self.per, ("head", "token")))

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.uses_hidden = config.per == "token"
        self.window_factor = nn.Parameter(torch.empty(shape.heads))
        self.register_parameter("token_weight", None)
        if self.uses_hidden:
            if shape.model_dim is None:
                raise LinearizeError(
                    "combine sigmoid with per: token reads hidden states, and this layer's model dim is unknown; "
                    "set LayerShape.model_dim, or use per: head"
                )
            self.token_weight = nn.Parameter(torch.empty(shape.heads, shape.model_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start = self.config.window_weight_init
        fill(self.window_factor, math.log(start / (1 - start)))
        if self.token_weight is not None:
            fill(self.token_weight, 0.0)

    def fit(
        self,
        window: Partial,
        recurrent: Partial,
        target: Tensor,
        hidden: Tensor | None,
        resize: Callable[[Tensor], bool],
    ) -> None:
        """g from the two branches' least-squares factors, what is left of the second one in the branch's own size.

        Where the recurrent branch has no size to set, g alone: <w - r, t - r> / |w - r|^2. g is kept from EDGE to
        1 - EDGE, so that its sigmoid still has a slope; a branch that heads are better without keeps SHUT.
        """
        near, far = window.normalized()[0], recurrent.normalized()[0]
        if resize(torch.ones_like(self.window_factor)):
            ours, theirs = fits.two_scales(near, far, target)
            most = torch.where(theirs > 0, 1 - self.EDGE, 1 - SHUT)
            share = ours.clamp_min(self.EDGE).minimum(most)
            resize(theirs / (1 - share))
        else:
            share = fits.scale(near - far, target - far).clamp(self.EDGE, 1 - SHUT)
        put(self.window_factor, share.logit())

    def lower(self, heard: float) -> bool:
        if self.token_weight is not None and heard > SHUT:  # 1 - g is nearly exp(-b - W x) where it is small
            put(self.window_factor, self.window_factor - math.log(heard))
            return True
        if self.token_weight is not None:
            put(self.token_weight, torch.zeros_like(self.token_weight))
        share = heard * (-self.window_factor).sigmoid()
        put(self.window_factor, -share.clamp_min(SHUT).logit())
        return True

    def forward(self, window: Partial, recurrent: Partial, hidden: Tensor | None = None) -> Tensor:
        logit = self.window_factor.to(accumulator(window.numerator.dtype))
        if self.token_weight is not None:
            assert hidden is not None, "see uses_hidden"
            logit = logit + product(hidden, self.token_weight.T)
        return blend(window, recurrent, logit.sigmoid(), (-logit).sigmoid())
