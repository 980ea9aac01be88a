"""The end of a step's passes in several processes: from here on all of them hold the whole batch's gradient.

Gradients are added up once a step, after its last micro-batch, which is what DistributedDataParallel does under
`no_sync`, and not by that class: it listens to the backward pass of its own forward pass, and attention transfer takes
its gradients inside a forward pass that has none, while a recorded micro-step calls no hooks at all. Losses come
divided by the whole batch's tokens (sequences, pairs), so that shares of unequal size need no weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from linearize.distill import processes
from linearize.distill.callbacks import Interrupt
from linearize.distill.micro import MicroBatch

ENOUGH = 2**62
"""As many sequences at once as anybody likes."""


def join(
    parameters: Iterable[nn.Parameter],
    values: Tensor,
    micro: MicroBatch,
    rows: tuple[int, int],
    interrupt: Interrupt | None,
) -> None:
    """Add up gradients and losses, and agree on what all processes do alike.

    First comes what is said on the host: it notices a process that is gone, where NCCL would wait for it.

    Args:
        parameters: everything that trains.
        values: losses of this process's part of the step, changed in place.
        micro: takes the least that fits anywhere.
        rows: sequences and tokens of this process's part.
        interrupt: takes what any of them was asked for.

    Raises:
        ProcessLost: another one is gone.
    """
    if not processes.several():
        return
    parameters = list(parameters)
    least = micro.size if micro.halved else ENOUGH
    wish = 0 if interrupt is None else interrupt.wish
    # experts that no token of a process came to have no gradient there
    reached = [int(parameter.grad is not None) for parameter in parameters]
    wish, least, *reached = processes.most([wish, -least, *reached])
    if interrupt is not None:
        interrupt.agree(wish)
    if -least < ENOUGH:
        micro.no_more_than(-least, rows)
    for parameter, anywhere in zip(parameters, reached, strict=True):
        if anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    processes.add_up([values, *(p.grad for p in parameters if p.grad is not None)])
