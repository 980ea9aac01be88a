"""Launching Triton kernels, or recording what would be launched, so that every configuration can be compiled ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Launch:
    """One launch that was recorded and not made: the kernel, its arguments by name, and num_warps and the like."""

    kernel: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)


records: list[Launch] | None = None
OPTIONS = ("num_warps", "num_stages", "maxnreg")
REGISTERS = 255
"""Most registers of a thread, said aloud: ptxas on its own takes 32 for some large kernels on sm_80 and spills 50 KB."""


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """``kernel[grid](**arguments)`` on the device of its tensors; nothing for an empty grid.

    Args:
        kernel: a `triton.jit` function.
        grid: up to three sizes.
        **arguments: the kernel's parameters by name, and num_warps, num_stages, maxnreg.
    """
    if 0 in grid:
        return
    arguments.setdefault("maxnreg", REGISTERS)
    if records is not None:
        options = {name: value for name, value in arguments.items() if name in OPTIONS}
        rest = {name: value for name, value in arguments.items() if name not in OPTIONS}
        records.append(Launch(kernel, rest, options))
        return
    device = next((x.device for x in arguments.values() if isinstance(x, Tensor)), None)
    if device is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments)
        return
    kernel[grid](**arguments)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of making them. Outputs stay uninitialized; kernels need no device."""
    global records
    before, records = records, []
    try:
        yield records
    finally:
        records = before
