"""Rules that join the window's and the recurrent branch's partials into one output; one file each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from linearize.kernels.window_linear.reference import divide
from linearize.mixers.base import LayerShape, Part, Partial
from linearize.registry import Registry, discover

SHUT = 0.002
"""Share of a branch that is to say nothing: too little to be heard, enough to learn from."""


class Combine(Part):
    """Base of the rules; built only for mixers that have both branches.

    Args:
        config: the rule's options.
        shape: the layer's numbers.

    Attributes:
        needs_normalizer: joins denominators, so the recurrent branch must have one.
        uses_hidden: `forward` wants the layer's hidden states.
    """

    needs_normalizer: ClassVar[bool] = False
    uses_hidden: bool = False

    def __init__(self, config: Any, shape: LayerShape) -> None:
        super().__init__()

    def fit(
        self,
        window: Partial,
        recurrent: Partial,
        target: Tensor,
        hidden: Tensor | None,
        resize: Callable[[Tensor], bool],
    ) -> None:
        """Set the shares nearest the teacher's output by least squares; a rule without parameters stays as it is.

        Args:
            window, recurrent: the branches' partials on [1, N] tokens.
            target: [N, H, V] what the teacher gives.
            hidden: [1, N, D], where `uses_hidden`.
            resize: multiplies what the recurrent branch gives by [H], or says false.
        """

    def lower(self, heard: float) -> bool:
        """Move every share to the window; false, and nothing done, where the rule cannot.

        Args:
            heard: of the recurrent branch, what remains: from 1, as it is, down to `SHUT`, the window alone. What the
                branch itself gives stays, so that it can still learn to be heard.
        """
        return False

    def forward(self, window: Partial, recurrent: Partial, hidden: Tensor | None = None) -> Tensor:
        """Two partials -> output [B, T, H, V]; `hidden` [B, T, D] for rules with `uses_hidden`."""
        raise NotImplementedError(type(self))  # pragma: no cover - every registered rule defines it


def blend(window: Partial, recurrent: Partial, near: Tensor, far: Tensor) -> Tensor:
    """near * window + far * recurrent, each branch normalized by itself -> [B, T, H, V].

    A branch that has seen no key leaves its weight to the other one, so that the first tokens of a text, of which
    nothing has left the window yet, are not scaled down. A branch without a normalizer counts as having seen some.

    Args:
        near, far: weights, broadcastable to [B, T, H].
    """

    def share(weight: Tensor, branch: Partial) -> Tensor:
        return weight if branch.denominator is None else weight * (branch.denominator != 0)

    shares = share(near, window), share(far, recurrent)
    total = shares[0] + shares[1]
    numerator = shares[0][..., None] * window.normalized() + shares[1][..., None] * recurrent.normalized()
    return divide((near + far)[..., None] * numerator, total)


COMBINES: Registry[Combine] = Registry("combination")
discover(sys.modules[__name__])
