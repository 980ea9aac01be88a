"""Every recorded micro-step beside the same step, one operation after the other, from the same weights and batch.

Over a stage two sound runs drift apart, as far as its noise takes them; the gradients of one step do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.distill.captured import Captured

SHARE = 0.05
"""Of a tensor's gradient that bfloat16 may leave apart: its rounding, 2^-8, over the layers of a short model."""
FLOOR = 1e-3
"""And of the root mean square of all gradients, for tensors whose own is what is left of larger sums."""


def each_replay(monkeypatch: Any, share: float = SHARE, floor: float = FLOOR) -> list[float]:
    """From here on every replay is compared; the list gets the largest part of what may be apart, each time.

    Not for stages with dropout or windows that are drawn: the second step would draw others.
    """
    own, found = Captured.__call__, []

    def both(self: Captured, run: Any, batch: Any, count: Any, kind: Any = None) -> Tensor:
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        graph = self.graph
        losses = own(self, run, batch, count, kind)
        if graph is None or self.graph is not graph:
            return losses
        kept = [p.grad for p in self.parameters]
        for p, x in zip(self.parameters, before, strict=True):
            p.grad = None if x is None else x.clone()
        expected = run(batch, count)
        torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-4)
        found.append(_apart(kept, [p.grad for p in self.parameters], before, share, floor))
        for p, x in zip(self.parameters, kept, strict=True):
            p.grad = x
        return losses

    monkeypatch.setattr(Captured, "__call__", both)
    return found


def _apart(
    one: list[Tensor | None],
    other: list[Tensor | None],
    before: list[Tensor | None],
    share: float,
    floor: float,
) -> float:
    """The largest of all tensors' differences, over what it may be."""
    added = []
    for recorded, eager, start in zip(one, other, before, strict=True):
        if eager is None:  # a recording has a gradient of zeros where nobody gives one
            assert recorded is None or not recorded.any()
            continue
        assert recorded is not None, "a gradient that the recording does not give"
        added.append((recorded, eager) if start is None else (recorded - start, eager - start))
    count = sum(x.numel() for _, x in added)
    typical = (sum(x.double().square().sum() for _, x in added) / count).sqrt()
    return max(
        float((x - y).norm() / (share * y.norm() + floor * typical * y.numel() ** 0.5 + 1e-30))
        for x, y in added
    )
