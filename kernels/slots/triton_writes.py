"""What each slot takes of a token, 1 - exp(log decay), in the model's dtype and in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.launch import launch

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
BLOCK = 2048


@triton.jit
def complement(x):
    """1 - exp(x) without losing the digits of small x: below 1/32 by its series."""
    series = -x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666667)))
    return tl.where(x > -0.03125, series, 1.0 - tl.exp2(x * LOG2E))


@triton.jit
def writes_kernel(log_decay, writes, size, BLOCK: tl.constexpr):
    """`size` numbers, a block a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(log_decay + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(writes + at, complement(x).to(writes.dtype.element_ty), mask=at < size)


def launch_writes(log_decay: Tensor, writes: Tensor) -> None:
    """Fill `writes`; both contiguous, of one shape."""
    size = writes.numel()
    launch(
        writes_kernel, (-(-size // BLOCK),), log_decay=log_decay, writes=writes, size=size, BLOCK=BLOCK,
        num_warps=4, num_stages=1,
    )  # fmt: skip
