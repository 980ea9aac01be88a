"""Calls of states of stretches whose launches are compiled ahead of time: carrying, and steps of live heads alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from linearize.kernels.gated_delta import delta_step
from linearize.kernels.gated_linear import gated_linear_step
from linearize.kernels.stretches import carry


def carried() -> None:
    """Twelve levels of 9 heads of 64 x 64."""
    carry(torch.zeros(2, 12, 9, 64, 64), torch.zeros(2, dtype=torch.int64))


def delta() -> None:
    """A token of the delta rule."""
    q = torch.zeros(2, 108, 64, dtype=torch.bfloat16)
    live = torch.ones(2, 108, dtype=torch.bool)
    delta_step(q, q, q, torch.zeros(2, 108), torch.zeros(2, 108), torch.zeros(2, 108, 64, 64), live)


def linear() -> None:
    """A token of gated linear attention."""
    q = torch.zeros(2, 108, 64, dtype=torch.bfloat16)
    live, sums = torch.ones(2, 108, dtype=torch.bool), torch.zeros(2, 108, 64, 64)
    gated_linear_step(q, q, q, torch.zeros(2, 108, 64), sums, torch.zeros(2, 108, 64), live=live)


CALLS: dict[str, Callable[[], None]] = {
    "carry": carried,
    "delta rule, live heads": delta,
    "linear, live heads": linear,
}
