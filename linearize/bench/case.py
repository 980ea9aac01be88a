"""What is timed: a case (one operator at one size) and its contenders (functions of the same inputs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
PER_SEQUENCE = ("q", "k", "v", "docs", "log_decay", "beta", "a", "b", "erase", "write", "shares")
"""Names of inputs whose first dimension is the batch."""
Call = Callable[[], Tensor | Sequence[Tensor]]
Kind = Literal["ours", "peer", "tuned"]


class NotAvailable(Exception):
    """A contender cannot run here: a package or an operator is missing; the message says which."""


@dataclass(frozen=True)
class Contender:
    """One function that is timed.

    Args:
        name: as the table shows it.
        build: inputs -> a call without arguments that gives the outputs whose gradient is taken. Imports what it needs.
        kind: "ours"; "peer"; "tuned" for a peer that tunes itself for minutes at a new size, which runs last and only
            at the lengths of ``--peers-at``.
        layout: changes the inputs before anything is timed, such as to [B, H, T, D].
        shared: its time depends on the size alone, not on the operator that it stands beside: measured once.
        backward: whether it has one.
    """

    name: str
    build: Callable[[Tensors], Call]
    kind: Kind = "peer"
    layout: Callable[[Tensors], Tensors] | None = None
    shared: bool = False
    backward: bool = True


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Args:
        operator: what ``--only`` names.
        size: in words: "B=8 T=8,192 H=16 D=64".
        length: tokens in a sequence, the plot's horizontal axis.
        inputs: draws random inputs.
        trained: names of the inputs that get gradients.
        bytes: fewest bytes moved, forward and forward + backward: every input read once by each, every output and
            gradient written once.
        flops: fewest floating-point operations of matrix products, forward and forward + backward.
        contenders: ours first.
        remark: what the table should say about it.
        swept: it is one of several lengths of its operator, of which ``--peers-at`` chooses for self-tuning peers.
    """

    operator: str
    size: str
    length: int
    inputs: Callable[[Draw], Tensors]
    trained: tuple[str, ...]
    bytes: tuple[float, float]
    flops: tuple[float, float]
    contenders: tuple[Contender, ...]
    remark: str = ""
    swept: bool = False


class Draw:
    """Random tensors on one device from one seed; zeros would hide unwritten outputs and run faster than data.

    Args:
        device: where.
        dtype: of `normal` unless it is given another.
    """

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers of that standard deviation."""
        drawn = torch.randn(*size, generator=self.generator, device=self.device, dtype=torch.float32)
        return (scale * drawn).to(dtype or self.dtype)

    def whole(self, high: int, *size: int) -> Tensor:
        """Whole numbers from 0 to high - 1, int64."""
        return torch.randint(high, size, generator=self.generator, device=self.device)

    def documents(self, batch: int, tokens: int) -> Tensor:
        """Document numbers [B, T] of one document a row, int64."""
        return torch.zeros(batch, tokens, dtype=torch.int64, device=self.device)


def traffic(inputs: float, outputs: float, gradients: float | None = None) -> tuple[float, float]:
    """Fewest bytes moved, forward and forward + backward.

    Args:
        inputs: bytes of what is read, once forward and once backward.
        outputs: bytes written forward; backward reads as many of their gradient.
        gradients: bytes written backward; as many as the inputs by default.
    """
    forward = inputs + outputs
    return forward, 2 * forward + (inputs if gradients is None else gradients)
