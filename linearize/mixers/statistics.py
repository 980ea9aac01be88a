"""What a calibration knows of one layer's teacher: its queries, keys and outputs on some text, and what they say.

Everything is per query head and computed when a part asks for it. See `calibration`, which makes one for each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.errors import NotFiniteError
from linearize.mixers.base import LayerShape

LADDER = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 128.0)
"""Tokens within which memories that a calibration tries keep 1 / e of what they took in."""
STRENGTHS = (0.05, 0.2, 0.5, 0.9)
"""Shares of a new value that it tries."""


class Moments(NamedTuple):
    """What the teacher's softmax does, a document's first token left out of all but the last.

    Attributes:
        distance: [H] mean age in tokens.
        entropy: [H] mean, in nats.
        mass: [H] share of the attention off the first token.
        sink: [N, H] log of the first token's weight over the largest other one, for each query.
    """

    distance: Tensor
    entropy: Tensor
    mass: Tensor
    sink: Tensor


@dataclass
class Statistics:
    """One layer on a calibration text; tensors are float32, N tokens in a row, padding taken out.

    Attributes:
        shape: the layer's numbers.
        q, k: [N, H, K] and [N, M, K] as the recurrent branch sees them; M key-value heads.
        opens: [N] bool, true for the first token of a document.
        attention: gives the moments of the teacher's softmax, a quadratic pass.
        scores: gives `first`.
        where: the layer in words, for errors.
    """

    shape: LayerShape
    q: Tensor
    k: Tensor
    opens: Tensor
    attention: Callable[[], Moments]
    scores: Callable[[], Tensor] | None = None
    where: str = "the layer"

    @cached_property
    def moments(self) -> Moments:
        """See `Moments`.

        Raises:
            NotFiniteError: one of them is not finite; names it and the head.
        """
        found = self.attention()
        for name, value in zip(
            ("attention distance", "attention entropy", "attention mass"), found[:3], strict=True
        ):
            finite(value, f"{self.where}: the teacher's {name}")
        return found

    @cached_property
    def first(self) -> Tensor:
        """[N, H] scores of the documents' mean first key, as a window sees it, by the teacher's queries."""
        assert self.scores is not None, "see scores"
        return self.scores()

    @property
    def rate(self) -> Tensor:
        """[H] log decay > 0 a token under which a geometric memory has the mean age of the teacher's attention.

        Weights a^n have the mean age a / (1 - a) = d, so a = d / (1 + d) and -log a = log(1 + 1 / d). The first token
        of a text, where a softmax parks what it has no use for, is left out of d.
        """
        return torch.log1p(1 / self.moments.distance.clamp_min(0.05))

    @property
    def strength(self) -> Tensor:
        """[H] share of a new value in an average over as many tokens as the teacher's entropy counts: exp(-entropy)."""
        return (-self.moments.entropy).exp().clamp(0.02, 0.98)

    def ladder(self, heads: int) -> list[Tensor]:
        """Rates as `rate`, [heads] each and equal for all heads, that forget within LADDER tokens."""
        return [self.q.new_full((heads,), 1 / tokens) for tokens in LADDER]

    def shared(self, values: Tensor, heads: int) -> Tensor:
        """[H] positive values of the query heads -> [heads], the geometric mean of each group."""
        return values.log().view(heads, -1).mean(1).exp()


def finite(values: Tensor, what: str) -> None:
    """Refuse numbers that nothing can be set to.

    Args:
        values: [H, ...] by head.
        what: their name, for the error.

    Raises:
        NotFiniteError: one is NaN or infinite.
    """
    bad = ~values.isfinite()
    if bad.any():
        head = int(bad.flatten(1).any(1).nonzero()[0]) if values.dim() > 1 else int(bad.nonzero()[0])
        raise NotFiniteError(
            f"{what} is not finite (head {head}), so nothing can be calibrated by it; run.precision=fp32, another "
            "calibration text, or calibrate.tokens=0 to start from the published values"
        )
