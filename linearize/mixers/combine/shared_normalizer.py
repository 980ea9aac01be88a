"""One normalizer over both branches' disjoint token sets (LoLCATs, Zhang et al. 2024, arXiv 2410.10254, eq. 7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.kernels.window_linear.reference import divide
from linearize.mixers import fits
from linearize.mixers.base import LayerShape, Part, Partial, fill, put
from linearize.mixers.combine import COMBINES, Combine
from linearize.mixers.options import number


@COMBINES.register("shared_normalizer")
class SharedNormalizer(Combine):
    """y = (g * num_window + a * num_recurrent) / (g * den_window + a * den_recurrent).

    g = sigmoid(factor) per head is learned; a is 1, or 1 - g. The window's weights are exp(s - max s) and the
    recurrent ones are not rescaled by the same maximum: the maximum is part of LoLCATs' function, so that is the
    default. ``stabilized: true`` puts both on one scale (weights exp(s) and phi.phi), which is invariant to a shift
    of the scores but is not what published checkpoints were trained with.
    """

    needs_normalizer = True
    REACH = 12.0
    """Largest size of a calibrated factor: a share of e^-12 is none."""
    SEARCHED = 1024
    """Tokens that the search looks at: it is for one number a head."""

    @dataclass
    class Config(Part.Config):
        window_weight_init: float = number(0.1, above=0, below=1)
        """g at the start."""
        complement: bool = False
        """a = 1 - g instead of 1 (LoLCATs' affine attention factors)."""
        stabilized: bool = False
        """Both branches on one scale."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.config = config
        self.window_factor = nn.Parameter(torch.empty(shape.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start = self.config.window_weight_init
        fill(self.window_factor, math.log(start / (1 - start)))

    def fit(
        self,
        window: Partial,
        recurrent: Partial,
        target: Tensor,
        hidden: Tensor | None,
        resize: Callable[[Tensor], bool],
    ) -> None:
        """The factor of each head with the least squared error, by a search over steps of two and then of a third.

        The output is a quotient, so there is no linear equation to solve. Without ``complement`` g ends below one, and
        a recurrent branch that harms can be made no smaller than it is.
        """
        every = -(-len(target) // self.SEARCHED)
        window, recurrent, target = window.every(every), recurrent.every(every), target[::every]
        best, least = (
            self.window_factor.detach().clone(),
            torch.full_like(self.window_factor, math.inf).double(),
        )

        def search(steps: list[float], around: Tensor) -> None:
            nonlocal best, least
            for step in steps:
                factor = (around + step).clamp(-self.REACH, self.REACH)
                put(self.window_factor, factor)
                error = fits.squared_error(self(window, recurrent)[0], target)
                best, least = torch.where(error < least, factor, best), torch.minimum(error, least)

        search(
            [float(step) for step in range(-int(self.REACH), int(self.REACH) + 1, 2)], torch.zeros_like(best)
        )
        search([step / 3 for step in range(-5, 6) if step], best.clone())
        put(self.window_factor, best)

    def lower(self, heard: float) -> bool:
        if not self.config.complement:
            return False
        share = heard * (-self.window_factor).sigmoid()
        put(self.window_factor, (-share.logit()).clamp_max(self.REACH))
        return True

    def forward(self, window: Partial, recurrent: Partial, hidden: Tensor | None = None) -> Tensor:
        assert window.denominator is not None and recurrent.denominator is not None, "see needs_normalizer"
        window = window.sums()
        assert window.denominator is not None
        weight = self.window_factor.to(window.denominator.dtype).sigmoid()
        near = window.scaled(weight.expand_as(window.denominator))
        far = recurrent
        if self.config.complement:
            far = recurrent.scaled((1 - weight).expand_as(recurrent.denominator))
        if self.config.stabilized and window.stabilizer is not None:
            # common scale max(m, 0): the recurrent weights are of order one already
            top = window.stabilizer.clamp_min(0.0)
            near, far = near.scaled((window.stabilizer - top).exp()), far.scaled((-top).exp())
        assert near.denominator is not None and far.denominator is not None
        return divide(near.numerator + far.numerator, near.denominator + far.denominator)
