"""`recurrent.carry` in one launch: a program owns some places of every state of a row, and mostly has nothing to do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels import dispatch
from linearize.kernels.launch import launch

PLACES = 2048
"""Of a state that a program owns."""


@triton.jit
def carry_kernel(states, target, L: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr):
    """States of SIZE numbers each, L of a row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    goal = tl.load(target + row).to(tl.int32)
    base = states + row * L * SIZE + place
    inside = place < tl.where(goal > 0, SIZE, 0)
    moved = tl.load(base + goal * SIZE, mask=inside, other=0.0)
    for level in range(goal):
        moved += tl.load(base + level * SIZE, mask=inside, other=0.0)
        tl.store(base + level * SIZE, tl.zeros([PLACES], tl.float32), mask=inside)
    tl.store(base + goal * SIZE, moved, mask=inside)


@torch.library.custom_op("linearize::carry", mutates_args=("states",))
def carried(states: Tensor, target: Tensor) -> None:
    """The launch; see `recurrent.carry`."""
    size = states[0, 0].numel() if states.numel() else 0
    launch(
        carry_kernel, (states.shape[0], -(-size // PLACES)), states=states, target=target.to(torch.int32).contiguous(),
        L=states.shape[1], SIZE=size, PLACES=PLACES, num_warps=4, num_stages=1,
    )  # fmt: skip


@carried.register_fake
def _(states, target) -> None:
    return None


def covered(states: Tensor) -> None:
    """Refuse what the kernel does not cover.

    Raises:
        KernelError: with the rule that is broken.
    """
    dispatch.require(
        "carry",
        state=(
            states.dtype == torch.float32 and states.is_contiguous(),
            f"{states.dtype} with strides {states.stride()}: it is written in place, contiguous and in float32",
        ),
    )
